"""The form that objectives have: what the loop does with any of them."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, script

import objectives
from engine.learner import total

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

    def prepare(self, batch, keys, learner):
        return (batch.tokens,), [batch.tokens.size] * 2

    def loss(self, gpt, heads, tokens):
        x = gpt.wte(tokens).square().mean(dim=-1)
        return [(x - self.own.wanted).square().sum(), x.sum()]
'''


@pytest.fixture
def toy():
    """An objective more, for as long as the test runs."""
    path = ROOT / "objectives" / "toy_of_a_test.py"
    path.write_text(TOY)
    yield path
    path.unlink()


def test_one_more_objective_is_one_file(toy, data, tmp_path):
    """--help knows its settings, it learns, resumes, is evaluated, and metrics have its terms."""
    own = ["--objective=toy_of_a_test", "--optimizer=adamw", "--lr=0.1", "--wanted=3"]
    assert "mean square of the hidden states" in script("train.py", own[0], "--help")
    run = tmp_path / "run"
    argv = ["config/small.py", f"--data={data}", f"--out={run}", *TINY, *own, "--steps=40"]
    said = script("train.py", *argv, "--eval_every=20")
    assert "size" in said
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val_size" in line]
    assert len(rows) == 2
    said = script("evaluate.py", run)
    assert float(said.split("size ")[1].split()[0]) == pytest.approx(3, abs=0.5)
    assert "nothing to do" in script("train.py", *argv, "--eval_every=20")
    refused = subprocess.run(
        [sys.executable, "train.py", *argv, "--mask=full"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "causal or prefix" in refused.stderr


def test_the_loss_is_the_weighted_sum_of_means():
    objective = SimpleNamespace(terms={"a": 1.0, "b": 50.0, "told": 0.0})
    assert total(objective, [6.0, 4.0, math.nan], [3, 8, 0]) == 6 / 3 + 50 * 4 / 8
    assert total(objective, [6.0, 0.0, 1.0], [3, 0, 1]) == 2  # nothing was asked of b


def test_only_files_of_the_folder_are_objectives():
    with pytest.raises(ValueError, match="did you mean masked"):
        objectives.find("maskd")
    with pytest.raises(ValueError, match="unknown"):
        objectives.find("os")
