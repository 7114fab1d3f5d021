"""Preference: the loss by the paper's formula, pairs as data, and what they teach."""

import json
import math
import re
from pathlib import Path

import numpy as np
import promises
import pytest
import torch
from test_rows import save, talk

import evaluate
import prepare
import sample
import train as trainer
from dataset import IGNORE, Dataset
from engine.checkpoint import load_model
from objectives import preference

ARGV = ["--objective=preference"]
SMALL = ["--tokenizer=bytes", "--workers=1"]


def pair(n: int) -> dict:
    """Asked for a number's double, which is better than its triple."""
    return dict(prompt=f"{n}", chosen=f"{2 * n}", rejected=f"{3 * n}", task="double")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows, pairs of the same task in the same vocabulary, and a run that has learned the rows."""
    out = tmp_path_factory.mktemp("preference")
    rows = [talk(f"{n}", f"{2 * n}", task="double") for n in range(200)]
    prepare.main([save(out / "rows.jsonl", rows), f"--out={out / 'rows'}", *SMALL])
    source = save(out / "pairs.jsonl", [pair(n) for n in range(1, 200)])
    prepare.main([source, f"--out={out / 'pairs'}", *SMALL])
    (out / "empty.py").write_text("")
    argv = [str(out / "empty.py"), f"--data={out / 'rows'}", f"--out={out / 'run'}"]
    assert trainer.main([*argv, *promises.TINY]) == 0
    return out


@pytest.fixture
def made(folder):
    return promises.make(folder / "pairs", *ARGV, f"--init_from={folder / 'run'}")


def log_p(gpt, tokenizer, prompt: str, answer: str) -> float:
    """ln p of an answer and its end, from softmax, one token at a time."""
    asked = tokenizer.encode_row([dict(role="user", content=prompt)], "double", open=True)
    said = [*tokenizer.encode(answer), tokenizer.markers.end]
    with torch.no_grad():
        p = gpt(torch.tensor([asked + said])).double().softmax(-1)[0]
    return sum(math.log(p[len(asked) + i - 1, token]) for i, token in enumerate(said))


# --- pairs as data


def test_a_pair_is_one_document_and_prepared_like_rows(folder, capsys):
    data = Dataset(str(folder / "pairs"))
    assert data.kind == "pairs" and data.folders[0].kind == "pairs"
    ids = next(data.split("train").rows())
    task, messages = data.tokenizer.decode_row(ids)
    n = int(messages[0]["content"])
    assert task == "double" and ids[-1] == data.tokenizer.end_of_text
    said = [(m["role"], m["content"]) for m in messages]
    assert said == [("user", f"{n}"), ("assistant", f"{2 * n}"), ("assistant", f"{3 * n}")]
    assert data.tokenizer.digest() == Dataset(str(folder / "rows")).tokenizer.digest()


def test_both_answers_stand_behind_the_prompt_and_only_they_count(made):
    learner, batch = made
    t = learner.objective.tokenizer
    (tokens, targets, *_), counts = learner.objective.prepare(batch, learner)
    assert tokens.shape[:2] == (len(batch.keys), 2) and counts == [len(batch.keys)] * 6
    for i in range(len(batch.keys)):
        asked = t.decode(tokens[i, 0].tolist()).split("<|user|>")[1].split("<|end|>")[0]
        said = [t.decode(row[row != IGNORE].tolist()) for row in targets[i]]
        assert said == [f"{2 * int(asked)}<|end|>", f"{3 * int(asked)}<|end|>"]
        for row in tokens[i]:
            assert t.decode(row.tolist()).startswith(
                f"<|double|><|user|>{asked}<|end|><|assistant|>"
            )
    assert "\n  chosen    " in learner.objective.shown((tokens, targets), 0)


def test_prompts_lose_their_front_and_what_has_no_room_is_left_out(tmp_path):
    rows = [dict(prompt="x" * n, chosen="yes", rejected=f"no {n}") for n in (5, 30)] * 1
    rows += [dict(prompt=f"{n}", chosen="y" * 40, rejected=f"{n} no") for n in range(3)]
    path = save(tmp_path / "long.jsonl", rows)
    prepare.main([path, "--val=0", "--test=0", f"--out={tmp_path / 'long'}", *SMALL])
    split = Dataset(str(tmp_path / "long")).split("train")
    markers, found = split.tokenizer.markers, []
    for batch in split.in_order(1, 20):
        (one, start), (two, _) = preference.pair_in(batch.tokens[0], markers)
        assert max(len(one), len(two)) <= 21  # a window of 20, and the last target
        texts = one[:start], one[start:], two[start:]
        found.append([split.tokenizer.decode(ids.tolist()) for ids in texts])
    asked = "<|user|>{}<|end|><|assistant|>".format
    assert sorted(found) == [
        [asked("x" * 5), "yes<|end|>", "no 5<|end|>"],
        [asked("x" * 11), "yes<|end|>", "no 30<|end|>"],
    ]
    assert "1 lose the front of their prompt; 3 are left out" in split.describe(20, 0)


ASKED = [dict(role="user", content="a?")]
MISTAKES = {
    "no field 'rejected' beside 'chosen'": dict(prompt="a?", chosen="a"),
    "no field 'chosen' beside 'rejected'": dict(messages=ASKED, rejected="a"),
    "a pair wants what is asked": dict(chosen="a", rejected="b"),
    "the answer is empty": dict(prompt="a?", chosen="a", rejected=" "),
    "the prompt is empty": dict(prompt="", chosen="a", rejected="b"),
    "chosen and rejected are the same": dict(messages=ASKED, chosen="a", rejected="a"),
    "messages of a pair should end with a user's turn": dict(
        messages=[dict(role="system", content="s")], chosen="a", rejected="b"
    ),
    "field 'chosen' is no text but": dict(prompt="a?", chosen={"a": 1}, rejected="b"),
    "a task cannot be called 'user'": dict(prompt="a?", chosen="a", rejected="b", task="user"),
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_a_broken_pair_is_named_with_its_line(complaint, tmp_path):
    path = save(tmp_path / "x.jsonl", [pair(1), MISTAKES[complaint]])
    with pytest.raises(ValueError, match="line 2: ") as error:
        prepare.main([path, f"--out={tmp_path / 'out'}", *SMALL])
    assert complaint in str(error.value)
    assert not (tmp_path / "out").exists()


def test_published_forms_are_read(tmp_path):
    """Answers as text or as conversations, prompts as text or as messages."""
    said = [dict(role="assistant", content="b")]
    rows = [
        dict(prompt="one", chosen="a", rejected="b"),
        dict(prompt=[dict(role="user", content="two")], chosen="a", rejected=said),
        dict(prompt="three", chosen="a", rejected=ASKED + said, messages=ASKED + said),
        dict(messages=[dict(role="user", content="four")], chosen="a", rejected="b"),
    ]
    path = save(tmp_path / "x.jsonl", rows)
    prepare.main([path, "--val=0", "--test=0", f"--out={tmp_path / 'x'}", *SMALL])
    data = Dataset(str(tmp_path / "x"))
    found = [data.tokenizer.decode_row(ids)[1] for ids in data.split("train").rows()]
    found = [[m["content"] for m in messages] for messages in found]
    assert sorted(found) == sorted([[n, "a", "b"] for n in ("one", "two", "three", "four")])


def test_pairs_and_rows_are_not_mixed(folder, tmp_path):
    with pytest.raises(ValueError, match="both rows and pairs"):
        sources = [str(folder / name) for name in ("rows.jsonl", "pairs.jsonl")]
        prepare.main([*sources, f"--out={tmp_path / 'x'}", *SMALL])
    with pytest.raises(ValueError, match="learn from one at a time"):
        Dataset(f"{folder / 'rows'},{folder / 'pairs'}")


# --- the objective


def test_the_loss_is_that_of_the_paper(made):
    learner, batch = made
    with torch.no_grad():  # another model than the reference
        for p in learner.gpt.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    learner.objective.own.beta = 0.7
    found = promises.means(learner, batch)
    first, _ = load_model(learner.objective.s.init_from)
    t = learner.objective.tokenizer
    (tokens, *_), _ = learner.objective.prepare(batch, learner)
    losses, margins, nats, rewards = [], [], [], []
    for row in tokens:
        n = int(t.decode(row[0].tolist()).split("<|user|>")[1].split("<|end|>")[0])
        new, old = ([log_p(g, t, f"{n}", f"{k * n}") for k in (2, 3)] for g in (learner.gpt, first))
        r = [0.7 * (new[k] - old[k]) for k in (0, 1)]
        losses.append(math.log(1 + math.exp(r[1] - r[0])))
        margins.append(r[0] - r[1])
        nats.append(-new[0] / (len(f"{2 * n}") + 1))
        rewards.append(r)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["total"] == found["loss"]  # the likelihood of the chosen is told, and no more
    assert found["margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert found["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert found["nats"] == pytest.approx(np.mean(nats), rel=1e-4)
    chosen, rejected = np.mean(rewards, axis=0)
    assert [found["chosen"], found["rejected"]] == pytest.approx([chosen, rejected], rel=1e-3)


def test_it_begins_at_ln_2_and_one_batch_is_learned_by_heart(made):
    found = promises.means(*made)
    assert found["total"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["margin"] == pytest.approx(0, abs=1e-5)
    assert promises.learns_by_heart(*made, rate=0.003) < 0.05
    assert promises.means(*made)["accuracy"] == 1


def test_likelihood_holds_up_the_chosen_answer(folder):
    after = {}
    for weight in (0.0, 1.0):
        argv = [*ARGV, f"--init_from={folder / 'run'}", f"--likelihood={weight}"]
        made = promises.make(folder / "pairs", *argv)
        before = promises.means(*made)
        assert before["total"] == pytest.approx(before["loss"] + weight * before["nats"])
        promises.learns_by_heart(*made, steps=20)
        after[weight] = promises.means(*made)
        assert after[weight]["accuracy"] > 0.9
    assert after[1.0]["nats"] < min(after[0.0]["nats"], before["nats"])


def test_a_prefix_sees_itself_whole_and_no_answer_sees_the_other(folder):
    argv = [*ARGV, f"--init_from={folder / 'run'}", "--mask=prefix"]
    learner, batch = promises.make(folder / "pairs", *argv)
    found = promises.means(learner, batch)
    assert found["total"] == pytest.approx(math.log(2), abs=1e-5)
    inputs, _ = learner.objective.prepare(batch, learner)
    assert inputs[3].shape == (len(batch.keys), 2, 1, *inputs[0].shape[2:] * 2)
    promises.shared_out_alike(learner, batch)


def test_what_the_reference_thought_is_kept_for_every_split(folder, made):
    learner, batch = made
    data = Dataset(str(folder / "pairs"))
    rows = sum(len(list(data.split(name).rows())) for name in ("train", "val", "test"))
    assert len(learner.objective.reference) == rows == 199
    learner.objective.kept(dict(keys=torch.tensor([1]), ln_p=torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="evaluate on the data of the run"):
        learner.objective.prepare(batch, learner)


def test_it_keeps_the_promises_of_all(train, folder, made, capsys, tmp_path):
    promises.shared_out_alike(*made)

    def said() -> str:
        return capsys.readouterr().out

    begin = f"--init_from={folder / 'run'}"
    run = promises.resumes(train, folder / "pairs", *ARGV, begin, "--sample_tokens=4")
    data = Dataset(str(folder / "pairs"))
    first = data.tokenizer.decode_row(next(data.split("val").rows()))[1][0]["content"]
    assert f"have not seen:\n\n{first}\n> " in said()  # the question, not one of both answers
    assert "nats a pair, nats" in promises.evaluates(run, capsys)
    promises.is_exported(run, tmp_path / "exported")
    evaluate.main([str(run), "--split=test"])
    train("shown", *ARGV, begin, "--show_batch=2", data=folder / "pairs")
    assert re.search(r"--- step 2, window 15\n.*\n  chosen    \d+<.end.>\n  rejected  \d+<", said())
    sample.main([str(run), "--prompt=3", "--task=double", "--max_tokens=3"])
    evaluate.main([str(run), f"--data={folder / 'rows'}"])
    assert "exact match" in said()
    kept = run / "objective.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="objective.safetensors is missing, or not what"):
        train("whole", *ARGV, begin, "--steps=9", data=folder / "pairs")


def test_what_does_not_go_together_is_refused(train, folder, data):
    begin = f"--init_from={folder / 'run'}"
    for argv, kind, complaint in (
        ([*ARGV, begin], "rows", "learns from pairs, and .* holds rows"),
        ([begin], "pairs", "learns from text or rows, and .* holds pairs"),
        (ARGV, "pairs", "init_from=''"),
        ([*ARGV, begin, "--train_on=all"], "pairs", "train_on='all'"),
        ([*ARGV, begin, "--beta=0"], "pairs", "beta=0.0 should be above 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            train("refused", *argv, data=folder / kind)
    with pytest.raises(ValueError, match="learns from text or rows"):
        evaluate.main([str(folder / "run"), f"--data={folder / 'pairs'}"])
    assert not (train.folder / "refused").exists()


def test_its_mistakes_become_pairs(folder, tmp_path, capsys):
    """evaluate.py --pairs writes what prepare.py takes."""
    file = tmp_path / "pairs.jsonl"
    argv = [str(folder / "run"), "--split=train", "--temperature=1", f"--pairs={file}"]
    evaluate.main([*argv, f"--answers={tmp_path / 'answers.jsonl'}"])
    wrong = {}
    for line in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()):
        if not line["exact match"] and line["answer"].strip():
            wrong[line["prompt"]] = line["reference"], line["answer"]
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    assert {p["messages"][0]["content"]: (p["chosen"], p["rejected"]) for p in pairs} == wrong
    assert len(pairs) == len(wrong) > 100
    prepare.main([str(file), f"--tokenizer={folder / 'run'}", f"--out={tmp_path / 'x'}"])
    assert Dataset(str(tmp_path / "x")).kind == "pairs"


def test_a_process_that_has_no_pair_in_the_last_batch_goes_on(folder, made):
    """In evaluation the last batch is filled up, so that all processes get equally many."""
    learner, *_ = made
    data = Dataset(str(folder / "pairs"), lines=True)
    split, found = data.split("val"), []
    assert len([*split.in_order(1, 32)]) % 4
    for rank in range(4):
        for batch in split.in_order(1, 32, rank, 4):
            found += learner.objective.prepare(batch, learner)[1][:1]
    assert sum(found) == len([*split.in_order(1, 32)]) and 0 in found
