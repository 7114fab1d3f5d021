"""Replaced tokens: what is drawn, what counts as replaced, and how well that is told."""

import math

import numpy as np
import promises
import pytest
import torch

from dataset import IGNORE
from objectives import masked, replaced

ARGV = ["--objective=replaced"]
TOLD = ("accuracy", "auc", "replaced", "flagged", "found")


@pytest.fixture
def made(data):
    return promises.make(data, *ARGV)


def trained(learner, batch):
    """A learner that has learned a batch by heart, and what its generator draws there."""
    promises.learns_by_heart(learner, batch, steps=40)
    return learner.eval()


def test_the_loss_begins_at_ln_v_and_fifty_times_ln_2(made):
    found = promises.means(*made)
    assert found["total"] == pytest.approx(math.log(257) + 50 * math.log(2), rel=1e-5)
    assert found["auc"] == 0.5 and found["flagged"] == 0  # all scores are equal
    assert promises.learns_by_heart(*made, steps=50) < 0.5 * found["total"]


def test_what_is_drawn_is_drawn_by_the_numbers_of_the_row_and_equal_ones_are_not_replaced(made):
    """By hand: the generator's distribution, inverted; a draw that is right is no replacement."""
    learner = trained(*made)
    inputs, counts = learner.objective.prepare(made[1], learner)
    shown, targets, hidden, positions, mask, tokens, counted, uniform = promises.tensors(inputs)
    assert uniform.shape == tokens.shape and uniform.min() >= 0 and uniform.max() < 1
    at, seen = targets != IGNORE, tokens.clone()
    with torch.no_grad():
        x = learner.gpt.wte(shown)
        x[hidden] = learner.heads["mask"][0]
        T = tokens.size(1)
        whole = torch.ones(1, 1, T, T, dtype=torch.bool)
        x = learner.heads["generator"].trunk(shown, whole, embedded=x)
        p = learner.gpt.logits(x).double().softmax(dim=-1)
        for b, t in at.nonzero().tolist():
            sums = p[b, t].cumsum(0)
            seen[b, t] = (sums <= uniform[b, t].double() * sums[-1]).sum()
        score = learner.heads["detect"](learner.gpt.trunk(seen, whole))[..., 0]
        sums = dict(zip(learner.objective.terms, learner(*promises.tensors(inputs)), strict=True))
    wrong = seen != tokens
    assert 0 < wrong.sum() < at.sum()  # some draws are lucky
    assert (wrong <= at).all() and counted.all() and mask is None and positions is None
    assert sums["replaced"] == wrong.sum() and sums["flagged"] == (score > 0).sum()
    assert sums["found"] == ((score > 0) & wrong).sum()
    nats = -torch.where(wrong, score.sigmoid().log(), (-score).sigmoid().log()).sum()
    assert float(sums["told_apart"]) == pytest.approx(float(nats), rel=1e-4)
    assert counts == [at.sum()] + [tokens.numel(), at.sum(), len(tokens)] + [tokens.numel()] * 3


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    score = torch.tensor([[3.0, 1.0, 2.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    was = torch.tensor([[True, True, False, False, True], [False] * 5])
    counted = torch.tensor([[True, True, True, True, False], [True] * 5])
    # 3 > 2, 3 > 1, 1 < 2, 1 = 1: two and a half of four
    assert replaced.areas(score, was & counted, counted).tolist() == [2.5 / 4, 0.5]


def test_with_weights_to_begin_with_the_generator_begins_with_the_first_blocks(made):
    gpt, objective = made[0].gpt, made[0].objective
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_()
    fresh = objective.heads(gpt)["generator"].state_dict()
    objective.s.init_from = "out/masked"
    begun = objective.heads(gpt)["generator"].state_dict()
    assert {name.split(".")[1] for name in begun} == {"0"}  # of two
    assert all(torch.equal(begun[name], gpt.state_dict()[name]) for name in begun)
    assert not all(torch.equal(begun[name], fresh[name]) for name in begun)


def test_no_gradient_comes_through_what_is_drawn(made):
    """The generator learns from its masked tokens alone."""
    learner, batch = made
    inputs, _ = learner.objective.prepare(batch, learner)
    with torch.no_grad():
        learner.heads["detect"].weight.fill_(0.1)
        for p in learner.heads["generator"].parameters():
            p.add_(0.01)
    learner(*promises.tensors(inputs))[1].backward()
    assert all(p.grad is None for p in learner.heads["generator"].parameters())
    assert learner.gpt.wte.weight.grad is None  # it is the generator's
    assert learner.heads["detect"].weight.grad.abs().sum() > 0


def test_it_is_masked_by_the_same_draws_as_masked_alone(data, made):
    """But all that is asked for is hidden: the generator is to guess, and not to look."""
    learner, batch = made
    alone, *_ = promises.make(data, "--objective=masked")
    ours, theirs = (x.objective.prepare(batch, x)[0] for x in (learner, alone))
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[2], theirs[1] != IGNORE)
    assert (theirs[2] <= ours[2]).all() and (theirs[2] != ours[2]).any()


def test_markers_and_what_is_filled_up_do_not_count(tmp_path):
    from test_rows import prepared, save, talk

    path = tmp_path / "rows.jsonl"
    rows = prepared(
        tmp_path / "rows", save(path, [talk(f"what is {i}?", f"{i}") for i in range(99)])
    )
    learner, batch = promises.make(tmp_path / "rows", *ARGV)
    inputs, counts = learner.objective.prepare(batch, learner)
    assert (inputs[-2] == (batch.tokens < 256)).all() and counts[1] == (batch.tokens < 256).sum()
    assert rows.tokenizer.markers.end_of_text in batch.tokens
    promises.shared_out_alike(learner, batch)


def test_it_keeps_the_promises_of_all(train, data, made, capsys, tmp_path):
    promises.shared_out_alike(trained(*made), *made[1:])
    run = promises.resumes(train, data, *ARGV)
    said = promises.evaluates(run, capsys)
    assert all(f"{name} " in said for name in TOLD)
    promises.is_exported(run, tmp_path / "exported")
    replaced.main([str(run), "--text=the model reads.", "--above=0"])
    assert capsys.readouterr().out.count("%]") == len("the model reads.")
    with pytest.raises(ValueError, match="learned by objective=replaced"):
        masked.main([str(run), "--fill=a <mask>"])
