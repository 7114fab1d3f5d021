"""Masked tokens: what is hidden, what is asked for, and that nothing else is seen or counted."""

import math

import numpy as np
import promises
import pytest
import torch

from dataset import IGNORE
from objectives import masked

ARGV = ["--objective=masked", "--tied=true"]


@pytest.fixture
def made(data):
    return promises.make(data, *ARGV)


def test_of_the_tokens_asked_for_80_are_hidden_10_replaced_10_shown(data):
    learner, batch = promises.make(data, *ARGV)
    many = batch._replace(
        tokens=np.tile(batch.tokens, (50, 1)),
        targets=np.tile(batch.targets, (50, 1)),
        keys=[(3, i) for i in range(50 * len(batch.tokens))],
    )
    (shown, targets, hidden, positions, mask), counts = learner.objective.prepare(many, learner)
    asked = targets != IGNORE
    assert counts == [asked.sum()] * 2 and mask is None and positions is None
    assert (targets[asked] == many.tokens[asked]).all()
    assert asked.mean() == pytest.approx(0.15, abs=0.02)
    assert (hidden <= asked).all() and hidden.sum() / asked.sum() == pytest.approx(0.8, abs=0.03)
    changed = (shown != many.tokens) & ~hidden
    assert (changed <= asked).all() and changed.sum() / asked.sum() == pytest.approx(0.1, abs=0.03)
    assert (shown == many.tokens)[~asked].all()


def test_what_is_hidden_is_not_seen(made):
    learner, batch = made
    inputs, _ = learner.objective.prepare(batch, learner)
    shown, targets, hidden, *rest = promises.tensors(inputs)
    with torch.no_grad():
        before = learner(shown, targets, hidden, *rest)[0]
        shown[hidden] = (shown[hidden] + 7) % 256
        after = learner(shown, targets, hidden, *rest)[0]
    assert before == after


def test_the_loss_begins_at_ln_v_and_one_batch_is_learned_by_heart(made):
    found = promises.means(*made)
    assert found["total"] == pytest.approx(math.log(257), rel=0.02)
    assert promises.learns_by_heart(*made, steps=200) < 0.7


def test_what_is_filled_up_is_neither_asked_for_nor_seen(data, made):
    from dataset import Dataset

    learner = made[0]
    *_, last = Dataset(str(data)).split("val").in_order(1, 32)
    assert (last.targets == IGNORE).any()  # the last window is short
    inputs, _ = learner.objective.prepare(last._replace(keys=[(0, 0)]), learner)
    real = (last.targets != IGNORE).sum()
    assert (inputs[1][0, real + 1 :] == IGNORE).all()
    assert not inputs[4][0, 0, 0, real + 1 :].any()


def test_it_keeps_the_promises_of_all(train, data, made, capsys, tmp_path):
    promises.shared_out_alike(*made)
    run = promises.resumes(train, data, *ARGV)
    assert "accuracy" in promises.evaluates(run, capsys)
    promises.is_exported(run, tmp_path / "exported")
    masked.main([str(run), "--fill=a <mask> b <mask>"])
    said = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in said[-3:-1]] == ["<mask> 1:", "<mask> 2:"]
    assert said[-1].startswith("a ") and "<mask>" not in said[-1]


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, data):
    promises.two_processes_as_one(tmp_path, data, *ARGV)


def test_one_that_writes_no_text_is_not_asked_to(train, data):
    import evaluate
    import sample

    run = train("run", *ARGV)
    for word in ("--normalise=true", "--limit=3", "--generate=2"):
        with pytest.raises(ValueError, match="is for what writes, unlike objective=masked"):
            evaluate.main([str(run), f"--data={data}", word])
    with pytest.raises(ValueError, match="python -m objectives.masked"):
        sample.main([str(run)])
    train("writer", f"--init_from={run}")  # its trunk is where another begins
