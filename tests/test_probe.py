"""A probe sees what a trunk knows: the states are the means over each prompt alone."""

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_classify import ARGV, rows  # noqa: F401

import evaluate
import probe
from engine.checkpoint import load_model

if not find_spec("sklearn"):  # which takes seconds to load: not for those who run no test here
    pytest.skip("scikit-learn is not installed", allow_module_level=True)


@pytest.fixture(params=["causal", "prefix", "full"])
def run(request, train, rows):  # noqa: F811
    argv = [*ARGV, f"--mask={request.param}", "--lm_weight=0", "--steps=4"]
    return train("run", *argv, data=rows)


def test_the_states_are_the_means_over_each_prompt_alone(run):
    model, tokenizer = load_model(str(run))
    see = probe.Sight(model, tokenizer)
    texts = ["red", "a much longer text than that", "blue 7"]
    found = see(texts)
    for text, states in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        T = ids.size(1)
        mask = torch.ones(1, 1, T, T, dtype=torch.bool) if model.config.mask == "full" else None
        with torch.no_grad():
            alone = model.trunk(ids, mask)[0].mean(dim=0)
        np.testing.assert_allclose(states, alone.numpy(), atol=1e-5)


def test_rows_are_read_with_the_markers_that_the_model_knows(run):
    _, tokenizer = model = load_model(str(run))
    row = probe.Row("colour", [dict(role="user", content="red 1")], "warm")
    assert probe.Sight(*model).ids(row) == tokenizer.encode_row(row.messages, "colour", open=True)
    unknown = row._replace(task="other")
    assert probe.Sight(*model).ids(unknown) == tokenizer.encode_row(row.messages, open=True)


def test_a_regression_on_states_stands_beside_floors(train, rows, capsys):  # noqa: F811
    run = train("run", *ARGV, "--steps=60", "--eval_every=60", data=rows)
    capsys.readouterr()
    evaluate.main(
        [str(run), "--probe", "--split=test", "--nearest=green 3", "--map=", "--limit=300"]
    )
    out = capsys.readouterr().out
    table = [re.split(r"  +", line) for line in out.splitlines() if " to " in line]
    found = {name: float(value) for name, value, _ in table}
    assert [*found] == ["this trunk", "bag of words", "random weights", "most frequent"]
    assert found["this trunk"] > 95 and found["bag of words"] > 95
    assert found["most frequent"] < 70
    near = [line for line in out.splitlines() if line.startswith("+")]
    assert len(near) == probe.NEIGHBOURS and " cold " in near[0]


def test_the_model_of_a_text_is_probed_and_drawn_as_well(train, rows, data, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    run = train("run", "--objective=masked")
    evaluate.main([str(run), f"--data={rows}", "--probe", f"--map={tmp_path}/rows.png"])
    assert "bag of words" in capsys.readouterr().out
    evaluate.main([str(run), f"--map={tmp_path}/tokens.png", "--nearest=the model reads"])
    for name in ("rows", "tokens"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="probe needs rows with labels"):
        evaluate.main([str(run), "--probe"])
    with pytest.raises(ValueError, match="should be a name that ends in"):
        evaluate.main([str(run), "--map=x.txt"])


def test_components_are_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 1)) @ np.array([[3.0, 4.0, 0.0]]) + 0.1 * rng.normal(size=(500, 3))
    at, share = probe.components(x)
    assert share[0] > 0.99
    assert abs(np.corrcoef(at[:, 0], x @ [0.6, 0.8, 0])[0, 1]) > 0.999
