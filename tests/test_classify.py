"""Classify: the label is told by the last state of the prompt, and the answer is not seen."""

import json
import math

import promises
import pytest
import torch
from test_rows import prepared, save, talk

from dataset import IGNORE
from judge import Judge
from objectives import classify

ARGV = ["--objective=classify", "--block_size=64"]
COLOURS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold", "grey": "none"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows whose answers are three labels, some with a turn before."""
    folder = tmp_path_factory.mktemp("rows")
    found = []
    for i in range(400):
        colour = [*COLOURS][i % 5]
        turns = ["hello", "warm"] if i % 9 == 0 else []
        found.append(talk(*turns, f"{colour} {i}", COLOURS[colour], task="colour"))
    prepared(folder / "data", save(folder / "rows.jsonl", found))
    return folder / "data"


@pytest.fixture
def made(rows):
    return promises.make(rows, *ARGV)


def test_labels_are_the_answers_of_the_training_split(made):
    learner, batch = made
    assert learner.objective.labels == ["cold", "none", "warm"]
    assert learner.objective.task == "colour"
    inputs, counts = learner.objective.prepare(batch, learner)
    tokens, positions, mask, ends, targets, labels = inputs
    markers = learner.objective.tokenizer.markers
    for i, row in enumerate(batch.tokens):
        told = learner.objective.tokenizer.decode(row.tolist()).split("<|assistant|>")[-1]
        assert told.split("<|end|>")[0] == learner.objective.labels[labels[i]]
        assert tokens[i, ends[i]] == markers.assistant
        assert (tokens[i, ends[i] + 1 :] == markers.end_of_text).all()  # the answer is not there
        assert (targets[i, : ends[i]] == tokens[i, 1 : ends[i] + 1]).all()
        assert (targets[i, ends[i] :] == IGNORE).all()
    assert positions is None and mask is None
    assert counts == [len(ends), ends.sum(), len(ends)]


def test_the_loss_begins_at_ln_labels_and_a_half_of_ln_v(made):
    V = made[0].gpt.config.vocab_size
    found = promises.means(*made)
    assert found["total"] == pytest.approx(math.log(3) + 0.5 * math.log(V), rel=1e-5)
    assert promises.learns_by_heart(*made, steps=60) < 0.5 * found["total"]


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("mask", ["causal", "prefix", "full"])
def test_a_row_is_classified_as_if_it_were_alone(rows, mask, pool):
    """By hand, from the prompt alone: what fills it up is not seen, nor what answers it."""
    own = [f"--mask={mask}", "--lm_weight=0", f"--pool={pool}"]
    learner, batch = promises.make(rows, *ARGV, *own)
    promises.learns_by_heart(learner, batch, steps=5)
    learner.eval()
    inputs, counts = learner.objective.prepare(batch, learner)
    assert counts[1] == 0
    ends, labels = inputs[3], inputs[5]
    assert len({*ends.tolist()}) > 1
    nats = 0.0
    with torch.no_grad():
        for row, end, label in zip(batch.tokens, ends, labels, strict=True):
            prompt = torch.from_numpy(row[None, : end + 1])
            T = end + 1
            whole = torch.ones(1, 1, T, T, dtype=torch.bool)
            if mask == "prefix":
                first = int(
                    (prompt[0] == learner.objective.tokenizer.markers.assistant).int().argmax()
                )
                whole = whole.tril()
                whole[..., : first + 1, : first + 1] = True
            x = learner.gpt.trunk(prompt, None if mask == "causal" else whole)
            h = x[0, -1] if pool == "last" else x[0].mean(dim=0)
            nats -= float(learner.heads["label"](h).log_softmax(-1)[label])
        assert float(learner(*promises.tensors(inputs))[0]) == pytest.approx(nats, rel=1e-4)


def test_it_keeps_the_promises_of_all(train, rows, made, capsys, tmp_path):
    promises.learns_by_heart(*made, steps=5)
    promises.shared_out_alike(*made)
    run = promises.resumes(train, rows, *ARGV, "--lr=0.003", "--optimizer=adamw")
    assert "accuracy" in promises.evaluates(run, capsys)
    promises.is_exported(run, tmp_path / "exported")


def test_the_command_tells_the_label_and_labels_rows(train, rows, capsys, tmp_path):
    run = train("run", *ARGV, "--steps=60", "--eval_every=60", data=rows)
    capsys.readouterr()
    classify.main([str(run), "--text=blue 5"])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[0][1] == "cold" and {name for _, name in said} == {"cold", "none", "warm"}
    assert sum(float(p.rstrip("%")) for p, _ in said) == pytest.approx(100, abs=0.1)
    file = save(
        tmp_path / "asked.jsonl", [talk("grey 7", "?"), talk("red 1", "cold", "blue 2", "?")]
    )
    classify.main([str(run), f"--rows={file}"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["messages"][-1]["content"] for row in told] == ["none", "cold"]
    assert all(row["task"] == "colour" and 1 / 3 < row["probability"] <= 1 for row in told)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_judge_reads_the_states_that_were_learned_from(train, rows, pool):
    judge = Judge(str(train("run", *ARGV, f"--pool={pool}", data=rows)))
    markers = judge.tokenizer.markers
    prompt = judge.tokenizer.encode_row([dict(role="user", content="blue 5")], "colour")
    prompt = prompt[: prompt.index(markers.end) + 1] + [markers.assistant]
    with torch.no_grad():
        x = judge.learner.gpt.trunk(torch.tensor([prompt]))[0]
        h = x[-1] if pool == "last" else x.mean(dim=0)
        p = judge.learner.heads["label"](h).softmax(-1)
    texts = [judge.of_text("blue 5"), judge.of_text("orange 17")]
    assert judge(texts)[0] == pytest.approx(p.numpy(), rel=1e-4)


@pytest.mark.parametrize(
    "answer, why", [(str, "are 27[0-9] different"), (lambda i: "yes", "are 1 different")]
)
def test_what_has_no_labels_is_refused(tmp_path, answer, why):
    some = [talk(f"what is {i}?", answer(i)) for i in range(300)]
    prepared(tmp_path / "x", save(tmp_path / "x.jsonl", some))
    with pytest.raises(ValueError, match=why):
        promises.make(tmp_path / "x", *ARGV)


def test_what_does_not_go_together_is_refused(rows, data):
    with pytest.raises(ValueError, match="lm_weight=0.5 should be 0, unless"):
        promises.make(rows, *ARGV, "--mask=full")
    with pytest.raises(ValueError, match="learns from rows"):
        promises.make(data, *ARGV)


def test_an_answer_that_is_no_label_is_named(made):
    learner, batch = made
    learner.objective.labels = ["hot"]
    with pytest.raises(ValueError, match="(cold|none|warm)' is no answer in the training split"):
        learner.objective.prepare(batch, learner)
