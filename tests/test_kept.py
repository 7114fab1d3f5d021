"""What a run keeps: flushed before it is renamed, pruned with care, and the clock goes on."""

import os
import re
import time
from pathlib import Path

import pytest
from conftest import write_shards

from engine.checkpoint import saved_shape
from engine.metrics import read_metrics
from shape import GPTConfig


def steps_kept(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in run.glob("step-*") if p.name[5:].isdigit())


def evaluations(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if "val_loss" in row]


# --- the order of durable calls


def content_of(path: Path) -> tuple:
    """Which file this is, and a mark of its content."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.fixture
def durable(monkeypatch):
    """The durable calls in their order: ("flush", inode), and for each folder that is renamed
    ("rename", new name, {file inside: whether its content, as it is now, was flushed})."""
    flushed, calls = set(), []
    fsync = os.fsync

    def note_flush(handle):
        fsync(handle)
        found = os.stat(handle)
        flushed.add((found.st_ino, found.st_size, found.st_mtime_ns))
        calls.append(("flush", found.st_ino))

    def is_flushed(path: Path) -> bool:
        found = path.stat()
        return (found.st_ino, found.st_size, found.st_mtime_ns) in flushed

    def noting(original):
        def note_rename(source, target, *more, **options):
            folder = Path(source)
            if folder.is_dir():
                inside = {p.name: is_flushed(p) for p in (folder, *folder.rglob("*"))}
                calls.append(("rename", Path(target).name, inside))
            return original(source, target, *more, **options)

        return note_rename

    monkeypatch.setattr(os, "fsync", note_flush)
    for module in (os, Path):
        for name in ("rename", "replace"):
            monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return calls


def published(calls: list, target: str) -> tuple[dict, list]:
    """The files inside when `target` got its name, and what was flushed after that."""
    at = next(i for i, call in enumerate(calls) if call[:2] == ("rename", target))
    return calls[at][2], [inode for what, inode, *_ in calls[at:] if what == "flush"]


def test_every_file_of_a_checkpoint_is_flushed_before_the_folder_gets_its_name(train, durable):
    run = train("run", "--steps=1")
    state, later = published(durable, "step-00000001")
    files = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert files | {"encoding.json", "vocab.tiktoken"} <= state.keys()
    assert [name for name, flushed in state.items() if not flushed] == []
    assert run.stat().st_ino in later  # the new name, too


def test_the_log_is_flushed_before_a_checkpoint_that_relies_on_it(train, monkeypatch):
    """A checkpoint tells how long the log is: after a crash the log must not be shorter."""
    flushed, relied_on = {}, []
    fsync, rename = os.fsync, os.rename

    def note_flush(handle):
        fsync(handle)
        found = os.stat(handle)
        flushed[found.st_ino] = found.st_size

    def note_rename(source, target, *more, **options):
        log = Path(target).parent / "metrics.jsonl"
        if re.fullmatch(r"step-\d{8}", Path(target).name):
            relied_on.append((log.stat().st_size, flushed.get(log.stat().st_ino)))
        return rename(source, target, *more, **options)

    monkeypatch.setattr(os, "fsync", note_flush)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, note_rename)
        monkeypatch.setattr(Path, name, lambda path, target: note_rename(path, target))
    train("run")
    assert len(relied_on) >= 2
    assert all(size == safe for size, safe in relied_on)


def test_every_file_of_a_data_set_is_flushed_before_the_folder_gets_its_name(
    durable, tmp_path, text_file
):
    import prepare

    prepare.main([str(text_file), f"--out={tmp_path / 'set'}", "--tokenizer=bytes"])
    state, later = published(durable, "set")
    assert {"train_000000.bin", "val_000000.bin", "test_000000.bin", "meta.json"} <= state.keys()
    assert {"encoding.json", "vocab.tiktoken"} <= state.keys()
    assert [name for name, flushed in state.items() if not flushed] == []
    assert tmp_path.stat().st_ino in later


# --- which checkpoints there are


def test_the_last_step_is_saved_and_evaluated_whatever_the_intervals(train):
    run = train("run", "--steps=7", "--save_every=4", "--eval_every=3")
    assert steps_kept(run)[-1] == 7
    assert [row["step"] for row in evaluations(run)] == [3, 6, 7]
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 8))


def test_the_best_checkpoint_stays_however_old_it_is(train, tmp_path):
    """It learns one window by heart, and so gets worse at another from step to step."""
    data = write_shards(tmp_path / "toy", train=range(60, 93), val=range(160, 193))
    every = ["--save_every=1", "--eval_every=1", "--steps=7", "--tokenizer=bytes"]
    run = train("run", *every, data=data)
    losses = {row["step"]: row["val_loss"] for row in evaluations(run)}
    best = min(losses, key=losses.get)
    assert best < 5, f"this test needs a best step that is older than the newest two: {losses}"
    assert steps_kept(run) == [best, 6, 7]


# --- the clock


def test_seconds_add_up_over_interruptions(train, monkeypatch):
    """The first half is measured by a clock that runs a million times too fast."""
    clock, real = time.monotonic, time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: real + (clock() - real) * 1e6)
        run = train("run", "--steps=4")
    first = [row["seconds"] for row in read_metrics(run)]
    assert first == sorted(first) and first[-1] > 1e4
    train("run", "--steps=8")
    second = [row["seconds"] for row in read_metrics(run)][len(first) :]
    assert second == sorted(second)
    # the checkpoint knows the time up to its last update; the evaluation came after it
    assert first[-2] <= second[0] < first[-1] + 1e4  # the second half took less than hours


def test_a_setting_of_the_shape_that_there_is_no_more_counts_only_if_it_was_on():
    assert saved_shape(dict(vocab_size=9, smear=False)) == GPTConfig(9)
    with pytest.raises(ValueError, match="smear: set, and in this version no setting"):
        saved_shape(dict(vocab_size=9, smear=True))
