"""The form that objectives have: what the loop does with any of them."""

import math
import sys
from types import SimpleNamespace

import promises
import pytest
from conftest import ROOT

import objectives
from engine import preflight
from objectives import Base

# what learns from more than plain text, or needs more than its name; each has a test of its own
ELSEWHERE = ("classify", "distil", "encoder_decoder", "preference", "reward", "vae")

TOY = '''
"""Toy: how large is the embedding of what is read?"""

from dataclasses import dataclass

from engine.settings import NotNegative
from objectives import Base


@dataclass
class Settings:
    wanted: NotNegative = 2.0  # mean square of the hidden states


class Objective(Base):
    terms = {"loss": 1.0, "size": 0.0}
    kinds = ("text",)

    def prepare(self, batch, learner):
        return (batch.tokens,), [batch.tokens.size] * 2

    def loss(self, gpt, heads, tokens):
        x = gpt.wte(tokens).square().mean(dim=-1)
        return [(x - self.own.wanted).square().sum(), x.sum()]
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An objective more: a file beside the others."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(folder)])
    yield
    sys.modules.pop("objectives.toy", None)


def test_one_more_objective_is_one_file(toy, train, capsys):
    """Its settings are known, it learns, is evaluated, and metrics have its terms."""
    import evaluate
    import train as command

    own = ["--objective=toy", "--lr=0.1", "--embed_lr=3", "--wanted=3"]
    with pytest.raises(SystemExit):
        command.main([own[0], "--help"])
    assert "mean square of the hidden states" in capsys.readouterr().out
    run = train("run", *own, "--steps=40", "--eval_every=20")
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val_size" in line]
    assert len(rows) == 2
    capsys.readouterr()
    evaluate.main([str(run)])
    said = capsys.readouterr().out
    assert float(said.split("size ")[1].split()[0]) == pytest.approx(3, abs=0.5)
    with pytest.raises(ValueError, match="causal or prefix"):
        train("other", *own, "--mask=full")


@pytest.mark.parametrize("name", objectives.names())
def test_each_falls_towards_0_from_above_and_is_shared_out_alike(name, data):
    """A new file is taken up. One whose terms may be below 0 wants a test with its own bounds."""
    if name in ELSEWHERE:
        assert (ROOT / "tests" / f"test_{name}.py").exists()
        return
    learner, batch = promises.make(data, f"--objective={name}")
    before = promises.means(learner, batch)
    assert before["total"] > 0 and min(before.values()) >= -1e-4
    promises.shared_out_alike(learner, batch)
    promises.learns_by_heart(learner, batch)
    after = promises.means(learner, batch)
    assert after["total"] < 0.8 * before["total"] and min(after.values()) >= -1e-4


def test_the_loss_is_the_weighted_sum_of_means():
    objective = SimpleNamespace(terms={"a": 1.0, "b": 50.0, "told": 0.0})
    assert Base.total(objective, [6.0, 4.0, math.nan], [3, 8, 0]) == 6 / 3 + 50 * 4 / 8
    assert Base.total(objective, [6.0, 0.0, 1.0], [3, 0, 1]) == 2  # nothing was asked of b


def test_only_files_of_the_folder_are_objectives():
    with pytest.raises(ValueError, match="did you mean masked"):
        objectives.find("maskd")
    with pytest.raises(ValueError, match="unknown"):
        objectives.find("os")


def test_another_objective_is_another_run(train):
    """It is refused by name, before anything of it is looked for."""
    train("run")
    with pytest.raises(ValueError, match="objective was 'next_token', is 'masked'"):
        train("run", "--objective=masked")


def test_a_checkpoint_from_before_there_were_objectives_goes_on(train):
    """Then label_smoothing and the others were settings of train.py, as they are by name now."""
    import json

    from engine.files import write_manifest
    from engine.learner import Opened

    run = train("run", "--label_smoothing=0.1")
    step = run / "step-00000008"
    state = json.loads((step / "state.json").read_text())
    del state["objective"], state["kept"], state["settings"]["objective"]
    (step / "state.json").write_text(json.dumps(state))
    write_manifest(step)
    train("run", "--label_smoothing=0.1", "--steps=12")
    learner = Opened(str(run), "8").learner()
    assert learner.objective.own.label_smoothing == 0.1


def test_the_objective_in_a_config_file_brings_its_settings(data, tmp_path):
    import train as command

    config = tmp_path / "mine.py"
    config.write_text('objective = "masked"\nmask_fraction = 0.3\n')
    assert preflight.read(command.Settings, [str(config)]).own.mask_fraction == 0.3
    assert (
        preflight.read(command.Settings, [str(config), "--mask_fraction=0.2"]).own.mask_fraction
        == 0.2
    )
    whose = "mask_fraction is a setting of objective=masked"
    with pytest.raises(ValueError, match=whose):
        preflight.read(command.Settings, ["--mask_fraction=0.2"])
    config.write_text("mask_fraction = 0.2\n")
    with pytest.raises(ValueError, match=whose):
        preflight.read(command.Settings, [str(config), "--objective=vae"])
    with pytest.raises(ValueError, match="temperature is a setting of objective=distil or reward"):
        preflight.read(command.Settings, ["--temperature=2"])
    config.write_text('_name = "masked"\nobjective = _name\n')
    with pytest.raises(ValueError, match="said plainly"):
        command.main([str(config), f"--data={data}"])


def test_lines_hold_one_document_each_and_are_as_long_as_the_longest(tmp_path):
    import prepare
    from dataset import IGNORE, Dataset

    lines = [f"{'word ' * (i % 7)}number {i}" for i in range(300)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n\n")
    out = tmp_path / "data"
    prepare.main([str(tmp_path / "lines.txt"), "--lines", "--tokenizer=bytes", f"--out={out}"])
    data = Dataset(str(out), lines=True)
    split, end = data.split("train"), data.tokenizer.end_of_text
    seen = set()
    for step in range(34):
        batch = split.batch(step, 8, 64, seed=1)
        longest = max((row != IGNORE).sum() for row in batch.targets)
        assert batch.tokens.shape == (8, longest)
        for x, y in zip(batch.tokens, batch.targets, strict=True):
            n = (y != IGNORE).sum()
            assert x[0] == end and y[n - 1] == end and (x[1:n] == y[: n - 1]).all()
            assert not x[n + 1 :].any()
            seen.add(data.tokenizer.decode(y[: n - 1].tolist()))
    assert seen <= {*lines} and len(seen) > 200
    assert "lose what is behind block_size=16" in split.describe(16, 1)
    counted = sum(int((b.targets != IGNORE).sum()) for b in split.in_order(8, 64))
    assert counted == split.tokens  # each token once, ends too
