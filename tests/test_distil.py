"""Distillation: the loss by the paper's formula, and a teacher that is read and never moved."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import promises
import pytest
import torch
from test_rows import save, talk

import evaluate
import prepare
import train as trainer
from dataset import IGNORE, Dataset
from engine import machine
from engine.checkpoint import load_model

ARGV = ["--objective=distil", "--n_layer=1"]
SMALL = ["--tokenizer=bytes", "--workers=1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    (out / "empty.py").write_text("")
    argv = [str(out / "empty.py"), f"--data={data}", f"--out={out / 'run'}", *promises.TINY]
    assert trainer.main([*argv, "--steps=40"]) == 0
    return out / "run"


@pytest.fixture
def made(data, teacher):
    return promises.make(data, *ARGV, f"--teacher={teacher}")


def test_the_loss_is_that_of_the_paper(data, teacher):
    """Also where not all targets count."""
    argv = [*ARGV, f"--teacher={teacher}", "--temperature=2", "--data_share=0.3"]
    learner, batch = promises.make(data, *argv)
    with torch.no_grad():
        learner.gpt.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    batch.targets[:, ::3] = IGNORE
    found = promises.means(learner, batch)
    at, tokens = batch.targets != IGNORE, torch.from_numpy(batch.tokens)
    with torch.no_grad():
        student, wanted = (g(tokens).double()[at] for g in (learner.gpt, learner.objective.teacher))
    ce, kl = [], []
    for p, q, target in zip(student, wanted, batch.targets[at], strict=True):
        ce.append(-math.log(p.softmax(-1)[target]))
        p, q = (p / 2).softmax(-1), (q / 2).softmax(-1)
        kl.append(float((q * (q / p).log()).sum()))
    assert found["cross_entropy"] == pytest.approx(np.mean(ce), rel=1e-4)
    assert found["kl"] == pytest.approx(4 * np.mean(kl), rel=1e-4)
    assert found["total"] == pytest.approx(0.3 * np.mean(ce) + 0.7 * 4 * np.mean(kl), rel=1e-4)


def test_it_begins_at_the_surprise_and_the_entropy_of_the_teacher(made):
    """A student that finds all V tokens equally likely: KL(q || 1/V) = ln V - entropy of q."""
    learner, batch = made
    found = promises.means(*made)
    with torch.no_grad():
        q = learner.objective.teacher(torch.from_numpy(batch.tokens)).softmax(-1)
    entropy = float(-(q * q.log()).sum(-1).mean())
    assert found["cross_entropy"] == pytest.approx(math.log(257), rel=1e-4)
    assert found["kl"] == pytest.approx(math.log(257) - entropy, rel=1e-3)


def test_of_a_student_that_is_its_teacher_the_kl_is_0(data, teacher):
    argv = ["--objective=distil", f"--teacher={teacher}", "--temperature=3"]
    found = promises.means(*promises.make(data, *argv, f"--init_from={teacher}"))
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    named = ["--objective=next_token", f"--init_from={teacher}"]
    text = promises.means(*promises.make(data, *named))
    assert found["cross_entropy"] == pytest.approx(text["loss"], rel=1e-5)


def test_data_alone_are_next_token_and_a_teacher_alone_is_imitated(data, teacher):
    argv = [*ARGV, f"--teacher={teacher}", "--data_share=1"]
    alone = promises.means(*promises.make(data, *argv))
    assert alone["total"] == alone["cross_entropy"]
    made = promises.make(data, *ARGV, f"--teacher={teacher}", "--data_share=0")
    before = promises.means(*made)["kl"]
    assert promises.learns_by_heart(*made, steps=100) < 0.1 * before


def test_the_teacher_is_frozen_and_no_part_of_the_student(train, data, teacher):
    before = {p: p.read_bytes() for p in teacher.rglob("*") if p.is_file()}
    run = train("student", *ARGV, f"--teacher={teacher}", "--dropout=0.1")
    assert {p: p.read_bytes() for p in teacher.rglob("*") if p.is_file()} == before
    assert not list(run.rglob("heads.safetensors"))
    learner, _ = promises.make(data, *ARGV, f"--teacher={teacher}", "--dropout=0.1")
    learner.train()
    theirs = learner.objective.teacher
    assert not theirs.training and not any(p.requires_grad for p in theirs.parameters())
    assert len(learner.by_name()) == len(list(learner.gpt.parameters()))


def test_it_keeps_the_promises_of_all(train, data, teacher, made, capsys, tmp_path):
    promises.shared_out_alike(*made)
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    argv = [*ARGV, f"--teacher={other}"]
    run = promises.resumes(train, data, *argv)
    said = promises.evaluates(run, capsys)
    assert "cross_entropy" in said and "bits per byte" in said and "perplexity" in said
    row = [json.loads(line) for line in open(run / "metrics.jsonl")][-1]
    assert row["val_loss"] == pytest.approx((row["val_cross_entropy"] + row["val_kl"]) / 2)
    promises.is_exported(run, tmp_path / "exported")
    shutil.rmtree(other)
    train("other", "--seed=2")
    shutil.copytree(tmp_path / "other", other)  # another one, at the same place
    with pytest.raises(ValueError, match="was trained with teacher"):
        train("whole", *argv, "--steps=9")


def test_the_text_is_told_as_next_token_tells_it(train, data, teacher, capsys):
    run = train("student", *ARGV, f"--teacher={teacher}")
    row = [json.loads(line) for line in open(run / "metrics.jsonl")][-1]
    model, _ = load_model(str(run), "latest")
    found = evaluate.evaluate(
        promises.plain(model),
        Dataset(str(data)).split("val"),
        machine.pick("cpu", "float32", "false"),
    )
    assert row["val_cross_entropy"] == pytest.approx(found["val_loss"], rel=1e-5)
    assert row["val_bpb"] == pytest.approx(found["val_bpb"], rel=1e-5)


def test_what_does_not_go_together_is_refused(train, data, teacher, text_file, tmp_path):
    prepare.main([str(text_file), f"--out={tmp_path / 'bpe'}", "--vocab_size=300"])
    masked = train("masked", "--objective=masked")
    for argv, complaint, folder in (
        ([], "teacher='' should be a run to learn from", data),
        (["--teacher=nowhere"], "no such folder: 'nowhere'", data),
        ([f"--teacher={teacher}"], "prepare it with --tokenizer=", tmp_path / "bpe"),
        ([f"--teacher={teacher}", "--temperature=0"], "temperature=0.0 should be above 0", data),
        ([f"--teacher={teacher}", "--block_size=64"], "block_size=64 should be at most 32", data),
        ([f"--teacher={teacher}", "--mask=prefix"], "mask='prefix' should be causal", data),
        ([f"--teacher={masked}"], "learned by objective=masked, which writes no text", data),
    ):
        with pytest.raises(ValueError, match=complaint):
            train("refused", *ARGV, *argv, data=folder)
    assert not (tmp_path / "refused").exists()


def test_rows_and_the_answers_of_a_teacher_are_learned_from(train, tmp_path):
    """Sequence-level distillation: evaluate.py --label, prepare.py, train.py."""
    rows = [talk(f"{n}", f"{2 * n}", task="double") for n in range(300)]
    source = save(tmp_path / "rows.jsonl", rows)
    prepare.main([source, f"--out={tmp_path / 'rows'}", *SMALL])
    teacher = train("teacher", data=tmp_path / "rows")
    train("student", *ARGV, f"--teacher={teacher}", data=tmp_path / "rows")
    told = tmp_path / "told.jsonl"
    evaluate.main([str(teacher), f"--label={source}", f"--answers={told}", "--max_tokens=3"])
    said = [json.loads(line) for line in told.read_text().splitlines()]
    assert [row["messages"][:-1] for row in said] == [row["messages"][:-1] for row in rows]
    argv = [f"--tokenizer={teacher}", f"--out={tmp_path / 'told'}", "--skip_bad"]
    prepare.main([str(told), *argv])
    ours, theirs = (Dataset(str(tmp_path / name)) for name in ("told", "rows"))
    assert ours.tokenizer.digest() == theirs.tokenizer.digest()
    train("taught", "--n_layer=1", data=tmp_path / "told")
    # back-translation: what was written becomes the prompt
    back = [
        {"en": row["messages"][1]["content"], "de": row["messages"][0]["content"]} for row in said
    ]
    source = save(tmp_path / "back.jsonl", back)
    columns = ["--prompt=en", "--answer=de", "--val=0", "--test=0"]
    prepare.main([source, *columns, *argv[::2], f"--out={tmp_path / 'back'}"])
    _, turns = ours.tokenizer.decode_row(
        next(Dataset(str(tmp_path / "back")).split("train").rows())
    )
    assert turns[1]["content"] in [row["de"] for row in back]  # what is sound is the answer
    joined = Dataset(f"{tmp_path / 'rows'},{tmp_path / 'back'}")
    assert joined.split("train").tokens > theirs.split("train").tokens
    for name in ("val", "test"):  # of these nothing is machine-made
        both = zip(joined.split(name).rows(), theirs.split(name).rows(), strict=True)
        assert all(list(a) == list(b) for a, b in both)
