"""Reward: advantages, clipping, and that it learns from its own answers as it promises."""

import json
import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import promises
import pytest
import torch
from conftest import TINY

import prepare
import rollout
import tasks
import train as script
from dataset import IGNORE, Dataset
from engine import preflight, settings
from engine.learner import Learner
from objectives import reward, with_settings

# a trivial task: an answer is the better, the more of it are digits
DIGITS = """
def digits(prompt, answer, reference):
    return sum(c.isdigit() for c in answer) / max(1, len(answer))
"""


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """Few sums, so that evaluation is short."""
    folder = tmp_path_factory.mktemp("reward")
    lines = [json.dumps(row) for row in islice(tasks.find("sums").rows("train", 0), 400)]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    prepare.main(
        [str(folder / "sums.jsonl"), f"--out={folder / 'sums'}", "--tokenizer=bytes", "--workers=1"]
    )
    return folder / "sums"


@pytest.fixture(scope="session")
def argv(sums):
    """Settings of a run that begins with a model that knows the form of an answer."""
    begun, empty = sums.parent / "begun", sums.parent / "empty.py"
    empty.write_text("")
    more = ["--steps=16", "--eval_every=16", "--lr=0.01"]
    assert script.main([str(empty), f"--data={sums}", f"--out={begun}", *TINY, *more]) == 0
    own = ["--objective=reward", f"--init_from={begun}", "--batch_tokens=128", "--max_tokens=6"]
    return [*own, "--lr=0.001", "--embed_lr=0.01", "--head_lr=0.001", "--group=4"]


def make(data, *argv):
    cls = with_settings(script.Settings, "reward")
    s = settings.load(cls, [*TINY, f"--data={data}", *argv], "", "config")
    preflight.check(s)
    dataset = Dataset(s.data, lines=True)
    objective = reward.Objective(s, dataset.tokenizer)
    objective.require(dataset)
    here = SimpleNamespace(say=print)
    learner = Learner(preflight.new_model(s, dataset, here), objective)
    B = s.batch_tokens // s.model.block_size
    batch = dataset.split("train").batch(0, B, s.model.block_size, s.seed)
    return learner, batch


def test_advantages_are_rewards_beside_those_of_the_group():
    """Half of two: 1 and -1. One of four: mean 1/4, deviation sqrt(3)/4. All equal: nothing."""
    found = reward.advantages(np.array([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0.1] * 4]))
    one = 1 / math.sqrt(3)
    wanted = [[1, -1, 1, -1], [-one, -one, -one, math.sqrt(3)], [0] * 4, [0] * 4]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "ratio, better, value, slope",
    [
        (1.0, 2.0, 2.0, 2.0),  # where it was: the gradient of r A, by ln p
        (1.1, 2.0, 2.2, 2.2),
        (1.3, 2.0, 2.4, 0.0),  # likelier than 1 + e already: nothing more to gain
        (0.7, 2.0, 1.4, 1.4),  # less likely, though better: mended however far it is
        (1.3, -2.0, -2.6, -2.6),  # likelier, though worse: likewise
        (0.7, -2.0, -1.6, 0.0),
    ],
)
def test_the_gain_is_clipped_where_it_is_too_good(ratio, better, value, slope):
    old = torch.tensor(-1.5)
    new = (old + math.log(ratio)).requires_grad_()
    found = reward.gain(new, old, torch.tensor(better), 0.2)
    found.backward()
    assert found.item() == pytest.approx(value) and new.grad.item() == pytest.approx(slope)


def test_prompts_are_padded_and_answers_are_the_targets():
    tokens, targets = rollout.padded([([1, 2], [3, 4, 5]), ([1], [6])], 9)
    assert tokens.tolist() == [[1, 2, 3, 4], [1, 9, 9, 9]]
    assert targets.tolist() == [[-100, 3, 4, 5], [6, -100, -100, -100]]


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_old_probabilities_are_those_by_which_answers_were_drawn(sums, argv, mask):
    """In the first update r = 1 everywhere: the loss is - sum of A over tokens."""
    learner, batch = make(sums, *argv, f"--mask={mask}", "--reward=sums")
    learner.objective.checker = lambda task: lambda prompt, answer, ref: len(set(answer))
    exercises = list(learner.objective.exercises(batch, learner))
    assert len(exercises) == 2
    inputs, (count, _) = exercises[0]
    tokens, _, targets, better, old, _, seen = inputs
    assert (mask == "causal") == (seen is None)
    asked = targets != IGNORE
    assert better.any() and asked[better != 0].any() and (old[asked] < 0).all()
    assert count >= asked.sum()
    loss, _ = learner(*promises.tensors(inputs))
    assert loss.item() == pytest.approx(-(better[:, None] * asked).sum(), abs=1e-3)
    # drawn one by one, without a cache
    i = int(np.flatnonzero(better)[0])
    at = np.flatnonzero(asked[i])
    if mask == "causal":
        with torch.no_grad():
            ln_p = learner.gpt(torch.tensor(tokens[i : i + 1])).log_softmax(dim=-1)[0]
        alone = ln_p[at, targets[i, at]]
        np.testing.assert_allclose(old[i, at], alone, atol=1e-4)


def test_answers_that_are_alike_are_learned_from_once(sums, argv):
    """As much as if each were there: the gradient is the same, in less time."""
    learner, batch = make(sums, *argv, "--max_tokens=1", "--group=16", "--inner=1")
    learner.objective.checker = lambda task: lambda prompt, answer, ref: answer.isdigit()
    texts = []
    answered = learner.objective.answered
    learner.objective.answered = lambda *args: texts.append(answered(*args)) or texts[0]
    inputs, (count, _) = next(learner.objective.exercises(batch, learner))
    (written, rewards), (tokens, _, targets, better, *_) = texts[0], inputs
    found = {(*row, *target[target != IGNORE]) for row, target in zip(tokens, targets, strict=True)}
    assert len(found) == len(tokens) < len(written) == count
    learner(*promises.tensors(inputs))[0].backward()
    once = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
    learner.zero_grad()
    tokens, targets = rollout.padded(written, learner.objective.tokenizer.end_of_text)
    better = reward.advantages(rewards.reshape(-1, 16)).ravel()
    inputs = (tokens, rewards, targets, better, None, None, None)
    learner(*promises.tensors(inputs))[0].backward()
    each = [p.grad for p in learner.parameters() if p.grad is not None]
    assert any(grad.any() for grad in each)
    for a, b in zip(once, each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_groups_of_equal_rewards_have_no_gradient(sums, argv):
    learner, batch = make(sums, *argv)
    learner.objective.checker = lambda task: lambda *texts: 0.5
    inputs, _ = next(learner.objective.exercises(batch, learner))
    learner(*promises.tensors(inputs))[0].backward()
    assert all(not p.grad.any() for p in learner.parameters() if p.grad is not None)
    assert learner.objective.told == {"reward": (8.0, 16)}


def test_a_group_is_drawn_alike_wherever_its_row_stands(sums, argv):
    learner, batch = make(sums, *argv)
    learner.objective.checker = lambda task: lambda prompt, answer, reference: len(answer)

    def drawn(*share):
        inputs, counts = next(learner.objective.exercises(batch.windows(*share), learner))
        with torch.no_grad():
            sums = [float(x) for x in learner(*promises.tensors(inputs))]
        return np.array([*sums, *counts]), learner.objective.told["reward"]

    (first, told), (second, also) = drawn(0, 2), drawn(2, 4)
    whole, all_told = drawn(0, 4)
    np.testing.assert_allclose(first + second, whole, rtol=1e-4, atol=1e-3)
    assert (told[0] + also[0], told[1] + also[1]) == all_told
    promises.shared_out_alike(learner, batch)


def test_rows_that_fill_up_are_neither_answered_nor_counted(sums, argv):
    """In evaluation the last batch of a process may lack some, or have none at all."""
    learner, batch = make(sums, *argv)
    learner.objective.checker = lambda task: lambda *texts: 0.25
    for there in (3, 0):
        targets = batch.targets.copy()
        targets[there:] = IGNORE
        inputs, counts = learner.objective.prepare(batch._replace(targets=targets), learner)
        missed, told = learner(*promises.tensors(inputs))
        assert counts == [there] * 2 and (missed, told) == (0.75 * there, 0.25 * there)


def test_it_learns_what_is_rewarded(sums, argv, train, tmp_path, monkeypatch):
    """From answers by chance to digits alone; mean rewards stand in metrics.jsonl."""
    (tmp_path / "checks.py").write_text(DIGITS)
    monkeypatch.syspath_prepend(tmp_path)
    more = ["--reward=checks:digits", "--steps=30", "--eval_every=10", "--group=8", "--lr=0.003"]
    run = train("run", *argv, *more, data=sums)
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    told = [row["reward"] for row in rows if "reward" in row]
    assert len(told) == 30 and np.mean(told[-5:]) > np.mean(told[:5]) + 0.1
    best = [row for row in rows if "val_loss" in row][-1]
    assert best["val_loss"] == pytest.approx(1 - best["val_reward"])
    evaluation = [f"--out={run}", "--eval_only=true", *TINY, *argv, *more, f"--data={sums}"]
    with pytest.raises(ValueError, match="stands in a checkpoint"):
        script.main(evaluation)


def test_it_keeps_the_promises_of_all(train, sums, argv, capsys, tmp_path):
    run = promises.resumes(train, sums, *argv)
    promises.is_exported(run, tmp_path / "exported")
    capsys.readouterr()
    script.main([f"--out={run}", "--eval_only=true", *TINY, *argv, f"--data={sums}"])
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    best = min(row["val_loss"] for row in rows if "val_loss" in row)
    assert f"loss {best:.4f} (1 - mean reward)" in capsys.readouterr().out
    import sample

    sample.main([str(run), "--task=sums", "--prompt=1+2=", "--max_tokens=5"])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--init_from="], "some must be right: give --init_from=RUN"),
        (["--dropout=0.1"], "dropout=0.1 should be 0"),
        (["--reward=summs"], "no built-in task 'summs'"),
        (["--reward=os:no_such"], "cannot be imported"),
        (["--group=1"], "at least 2"),
    ],
)
def test_mistakes_are_told(sums, argv, more, words):
    with pytest.raises(ValueError, match=words):
        make(sums, *argv, *more)


def test_data_without_a_check_are_refused(data, argv, tmp_path):
    with pytest.raises(ValueError, match="learns from rows"):
        make(data, *argv)
    row = dict(user="Hello", bot="Good day")
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps(row | dict(n=i)) for i in range(9)))
    talk = ["--prompt=user", "--answer=bot", "--tokenizer=bytes", "--val=0", "--test=0"]
    prepare.main([str(tmp_path / "talk.jsonl"), *talk, f"--out={tmp_path / 'talk'}"])
    with pytest.raises(ValueError, match="no built-in task 'rows'"):
        make(tmp_path / "talk", *argv)
