"""Loss curves say what the rows say, and nothing lags."""

import json
import math
import random

import pytest

import plot


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs whose loss falls in a straight line, the second with tokens of two bytes."""
    monkeypatch.chdir(tmp_path)
    for name, bytes_a_token in (("one", 1), ("two", 2)):
        rows = []
        for step in range(1, 101):
            rows.append(dict(step=step, tokens=8 * step, seconds=step / 2, loss=5 - step / 50))
            if step % 25 == 0:
                loss = 5 - step / 50
                row = dict(step=step, tokens=8 * step, seconds=step / 2, val_loss=loss)
                rows.append(row | dict(val_bpb=loss / bytes_a_token / math.log(2)))
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("share", [0, 0.5, 0.9, 0.99])
def test_a_straight_falling_line_smooths_to_itself(share):
    line = [5 - i / 50 for i in range(100)]
    assert plot.smoothed(line, share) == pytest.approx(line, abs=1e-12)


def test_smoothing_takes_noise_away():
    rng = random.Random(0)
    noise = [rng.gauss(0, 1) for _ in range(1000)]
    middle = plot.smoothed(noise, 0.9)[10:-10]
    assert sum(y * y for y in middle) / len(middle) < 0.1  # 1/19 is expected
    assert plot.smoothed(noise, 0) == noise
    assert plot.smoothed([], 0.9) == [] and plot.smoothed([3.0], 0.9) == [3.0]


def test_training_does_not_look_worse_than_validation_where_they_are_equal(runs):
    xs, training = plot.training("one", plot.Settings())
    at, validation = plot.curve("one", "val_loss", plot.Settings())
    assert at == [200, 400, 600, 800] and validation == [4.5, 4.0, 3.5, 3.0]
    assert [training[xs.index(x)] for x in at] == pytest.approx(validation)


@pytest.mark.parametrize("x, last", [("tokens", 800), ("step", 100), ("seconds", 50)])
def test_the_axis_is_the_one_asked_for(runs, x, last):
    s = plot.Settings(x=x)
    for xs, _ in (plot.training("one", s), plot.curve("one", "val_loss", s)):
        assert xs[-1] == last


def test_bits_per_byte_compare_runs_of_different_vocabularies(runs):
    for run, bytes_a_token in (("one", 1), ("two", 2)):
        s = plot.Settings(y="bpb")
        for _, ys in (plot.training(run, s), plot.curve(run, "val_bpb", s)):
            assert ys[-1] == pytest.approx(3 / bytes_a_token / math.log(2))


def test_bits_per_byte_that_nobody_knows_are_not_drawn(runs):
    path = runs / "one" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    unknown = [row | ({"val_bpb": None} if "val_bpb" in row else {}) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in unknown))
    with pytest.raises(ValueError, match=r"one has no bits per byte .* --y=loss"):
        plot.main(["one", "--y=bpb"])
    assert len(plot.curve("one", "val_loss", plot.Settings())[0]) == 4


def test_a_training_curve_in_bits_per_byte_is_called_an_estimate(runs, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="drawing needs matplotlib")
    labels = []
    real = pyplot.Axes.plot
    monkeypatch.setattr(
        pyplot.Axes, "plot", lambda *a, **how: labels.append(how["label"]) or real(*a, **how)
    )
    plot.main(["one"])
    plot.main(["one", "--y=bpb"])
    assert [label.split(" (best")[0] for label in labels] == [
        "one, training",
        "one, validation",
        "one, training (estimated)",
        "one, validation",
    ]


@pytest.mark.parametrize("out", ["loss.png", "loss.svg", "loss.pdf"])
def test_a_picture_is_written(runs, out, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    plot.main(["one", "two", f"--out={out}", "--y=bpb"])
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert (runs / out).stat().st_size > 5000
