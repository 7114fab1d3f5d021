"""Stop it anywhere, lose nothing: kills, damage, full disks and signals, on real runs.

`pytest -m soak` repeats the random ones many times over.
"""

import errno
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import forked
import pytest
from conftest import CODE, ROOT, TINY
from forked import Forked
from test_train import rows, training, weights

from engine import checkpoint, tensors
from engine.metrics import read_metrics
from engine.resume import lock

BUSY = ["--steps=80", "--eval_every=20", "--save_every=7", "--dropout=0.1", "--device_batch=4"]


class Killed(BaseException):
    """Ends a run where it stands: no handler in the project catches it."""


def arguments(data, out, *settings) -> list[str]:
    empty = out.parent / "empty.py"
    empty.write_text("")
    return [str(empty), f"--data={data}", f"--out={out}", *TINY, *settings]


def start(data, out, *settings, anew=False):
    """A process that trains. What it does while it loads torch is seen in those begun `anew`."""
    argv = [str(ROOT / "train.py"), *arguments(data, out, *settings)]
    if not anew:
        return Forked(*argv)
    return subprocess.Popen(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        process_group=0,
    )


def start_two(data, out, *settings, restarts: int = 0):
    """torchrun, and two processes that train."""
    argv = arguments(data, out, *settings)
    return forked.torchrun(ROOT / "train.py", *argv, restarts=restarts)


def finish(data, out, processes: int = 1) -> None:
    """A run with the settings BUSY to its end: one process of it needs none of its own."""
    if processes == 1:
        import train

        assert train.main(arguments(data, out, *BUSY)) == 0
        return
    forked.together(processes, "train.py", *arguments(data, out, *BUSY))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """uninterrupted(processes): a run with the settings BUSY that nothing has disturbed."""

    @cache
    def run(processes: int = 1):
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        finish(data, out, processes)
        return out

    return run


def assert_equal_runs(run, whole) -> None:
    assert weights(run, 80) == weights(whole, 80)
    assert rows(run) == rows(whole)
    assert [row["step"] for row in training(run)] == list(range(1, 81))


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


# --- killed


def test_killed_at_every_durable_operation(train, monkeypatch):
    """Dies in turn at each flush, rename and deletion that a run makes: all end alike."""
    settings = ["--steps=6", "--eval_every=2", "--save_every=1", "--dropout=0.1"]
    whole = train("whole", *settings)
    calls = 0

    def count_down(function):
        def counted(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls <= 0:  # also in whatever would clean up: a killed process does not
                raise Killed
            return function(*args, **kwargs)

        return counted

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, count_down(getattr(module, name)))
    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, count_down(getattr(Path, name)))
    calls = 10**6
    train("counted", *settings)
    total = 10**6 - calls
    assert total > 50
    for kill_at in range(1, total + 1, 6):
        calls = kill_at
        with pytest.raises(Killed):
            train(f"killed{kill_at}", *settings)
        calls = 10**6
        run = train(f"killed{kill_at}", *settings)
        assert weights(run, 6) == weights(whole, 6)
        assert rows(run) == rows(whole)
        left = {path.name for path in run.iterdir()}
        assert left == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_at_random_moments(data, tmp_path, kills, uninterrupted):
    rng = random.Random(kills)
    steps = []
    for _ in range(kills):
        process = start(data, tmp_path / "parts", *BUSY)
        known = len(read_metrics(tmp_path / "parts"))
        wait_for(lambda n=known: len(read_metrics(tmp_path / "parts")) != n, process)
        time.sleep(rng.random() * 0.4 * 4 / (kills + 4))
        process.kill()
        process.wait()
        steps.append(len(read_metrics(tmp_path / "parts")))
        if len(checkpoint.checkpoints(tmp_path / "parts")) and steps[-1] >= 84:
            shutil.rmtree(tmp_path / "parts")  # it had come to its end
    finish(data, tmp_path / "parts")
    assert_equal_runs(tmp_path / "parts", uninterrupted())


@pytest.mark.cpu
@pytest.mark.parametrize(
    "kills",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.soak)],
)
def test_torchrun_restarts_a_killed_rank(data, tmp_path, kills, uninterrupted):
    process = start_two(data, tmp_path / "parts", *BUSY, restarts=kills)
    for kill in range(kills):
        want = (kill + 1) * 70 // (kills + 1)
        wait_for(lambda n=want: len(training(tmp_path / "parts")) > n, process)
        children = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
        )
        victim = int(children.stdout.split()[kill % 2])
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda v=victim: not os.path.exists(f"/proc/{v}"), process)
        time.sleep(1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "resumed from step" in output
    assert_equal_runs(tmp_path / "parts", uninterrupted(2))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_compiled_runs_resume_to_the_same_bits(train, monkeypatch, kernels):
    """With kernels of torch's own the compiler does all that it does but call g++, twenty times."""
    monkeypatch.setattr("torch._inductor.config.fallback_by_default", not kernels)
    settings = ["--compile=true", "--dropout=0.1", "--dtype=bfloat16", "--n_layer=1"]
    whole = train("whole", *settings)

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("train.evaluate", dies)
        with pytest.raises(Killed):
            train("parts", *settings)
    parts = train("parts", *settings)
    assert weights(parts) == weights(whole) and rows(parts) == rows(whole)


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.soak)])
def test_prepare_killed_at_random_moments(tmp_path, text_file, kills):
    def files(folder) -> dict:
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    argv = [sys.executable, str(ROOT / "prepare.py"), str(text_file), "--vocab_size=340"]
    began = time.monotonic()
    subprocess.run([*argv, f"--out={tmp_path / 'whole'}"], check=True, capture_output=True)
    duration = time.monotonic() - began
    rng = random.Random(kills)
    for _ in range(kills):
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        process = subprocess.Popen(
            [*argv, f"--out={tmp_path / 'parts'}"], stdout=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1.0) * duration)
        process.kill()
        process.wait()
        finished = (tmp_path / "parts").exists()
        assert not finished or files(tmp_path / "parts") == files(tmp_path / "whole")
    subprocess.run([*argv, f"--out={tmp_path / 'parts'}"], check=True, capture_output=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert not (tmp_path / "parts.partial").exists()


# --- damaged


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run, its settings and its last output."""
    import train

    folder = tmp_path_factory.mktemp("finished")
    (folder / "empty.py").write_text("")
    argv = [str(folder / "empty.py"), f"--data={data}", f"--out={folder / 'run'}", *TINY]
    assert train.main(argv) == 0
    return folder / "run", argv


FILES = [*checkpoint.NEEDED, "model.safetensors", "optimizer.safetensors", "manifest.json"]
FILES = [f"step-00000008/{name}" for name in FILES]
FILES += ["metrics.jsonl", "metrics.sha256", "config.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut short", "flipped", "deleted"])
def test_damage_is_noticed_and_named(finished, file, damage, capsys):
    import train

    run, argv = finished
    good = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    final, log = weights(run), rows(run)
    content = bytearray(good[run / file])
    rng = random.Random(f"{file} {damage}")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if damage == "deleted":
        (run / file).unlink()
    else:
        cut = content[: rng.randrange(len(content))]
        (run / file).write_bytes(cut if damage == "cut short" else content)
    capsys.readouterr()
    try:
        try:
            assert train.main(argv) == 0
            said = capsys.readouterr().out
            assert weights(run) == final and rows(run) == log
        except ValueError as refusal:
            said = str(refusal)
            assert weights(run) == final
        name = "metrics.jsonl" if file == "metrics.sha256" else file.split("/")[-1]
        assert name in said or "evaluation of step 8" in said
    finally:
        shutil.rmtree(run)
        for path, old in good.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(old)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(finished, tmp_path):
    import train

    run, argv = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in copy.glob("step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    argv = [a.replace(str(run), str(copy)) for a in argv]
    with pytest.raises(ValueError, match=r"--fresh"):
        train.main(argv)
    assert read_metrics(copy) == read_metrics(run)
    assert train.main([*argv, "--fresh"]) == 0
    assert weights(copy) == weights(run)
    assert (tmp_path / "run.1" / "step-00000008.corrupt").exists()


# --- a full disk


def test_a_full_disk_leaves_earlier_checkpoints_whole(train, monkeypatch):
    run, whole, original = (
        train.folder / "run",
        weights(train("whole")),
        tensors.write_safetensors,
    )

    def full(path, shapes, pieces):
        if path.parent.name.startswith("step-00000008"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, shapes, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "write_safetensors", full)
        with pytest.raises(OSError, match=r"step-00000008 could not be saved \(No space left"):
            train("run")
    assert checkpoint.verify(run / "step-00000004", checkpoint.NEEDED) == 5
    assert not list(run.glob("*.partial"))
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"needs [\d.]+ MB and 0.0 MB are free"):
            train("run")
    assert weights(train("run")) == whole


@pytest.mark.cpu
def test_a_file_that_cannot_grow_is_an_error_of_one_sentence(data, tmp_path):
    """A limit on the size of files stands in for a full disk, below all of our own code."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    argv = arguments(data, tmp_path / "run")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40 << 10, 40 << 10))
    said = forked.run("train.py", *argv, before=limit, status=2)
    (error,) = [line for line in said.splitlines() if "error" in line or "Traceback" in line]
    assert re.fullmatch(r"train.py: error: .*step-00000004 could not be saved.*", error)
    assert said.endswith(f"{error}\n")
    assert not list((tmp_path / "run").glob("*.partial"))


# --- asked to stop


@pytest.mark.parametrize(
    "processes, stops",
    [
        pytest.param(1, 1, id="one process"),
        pytest.param(1, 20, id="one process, often", marks=pytest.mark.soak),
        pytest.param(2, 1, id="two processes", marks=[pytest.mark.slow, pytest.mark.cpu]),
        pytest.param(2, 20, id="two processes, often", marks=[pytest.mark.soak, pytest.mark.cpu]),
    ],
)
def test_stopped_at_random_moments(data, tmp_path, stops, processes, uninterrupted):
    rng = random.Random(stops)
    alone, run = processes == 1, tmp_path / "parts"
    for i in range(stops):
        process = start(data, run, *BUSY, anew=True) if alone else start_two(data, run, *BUSY)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 3))
        asked = time.monotonic()
        number = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][i % (3 if alone else 1)]
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - asked < 10
        assert process.returncode == 0 or not alone, output
        assert any(text in output for text in ("same command continues", "nothing to", "next:"))
        assert "Traceback" not in output or not alone  # torchrun has its own
    finish(data, run, processes)
    assert_equal_runs(run, uninterrupted(processes))


@pytest.mark.cpu  # where a step takes long enough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(data, tmp_path, number):
    slow = ["--n_embd=256", "--n_layer=2", "--batch_tokens=4096", "--steps=100"]
    process = start(data, tmp_path / "run", *slow)
    wait_for(lambda: read_metrics(tmp_path / "run"), process)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait() == 128 + number


# --- what else a run promises


def test_fresh_moves_the_old_run_aside(train, tmp_path, capsys):
    run = train("run")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    again = train("run", "--fresh", "--lr=0.01")
    assert "the old run is now" in capsys.readouterr().out
    aside = tmp_path / "run.1"
    assert {p.name: p.read_bytes() for p in aside.iterdir() if p.is_file()} == before
    assert len(training(again)) == 8 and rows(again) != rows(aside)


def test_show_batch_prints_what_a_step_trains_on(train, capsys, monkeypatch, data):
    from dataset import Dataset, Split

    seen = []
    original = Split.batch
    monkeypatch.setattr(Split, "batch", lambda *a: seen.append(original(*a)) or seen[-1])
    train("run")
    capsys.readouterr()
    train("run", "--show_batch=5")
    printed = capsys.readouterr().out
    tokenizer = Dataset(str(data)).tokenizer
    for i, window in enumerate(seen[4][0].tolist()):
        assert f"--- step 5, window {32 + i}\n{tokenizer.decode(window)}" in printed


def test_there_is_no_pickle_anywhere(finished):
    code = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    # but nanoGPT's, which is read as tensors and plain values: tests/test_nanogpt.py
    code, found = re.subn(r"torch\.load\(source, \S+, weights_only=True,", "", code)
    assert found == 1
    for word in (
        r"import pickle",
        r"pickle\.",
        r"torch\.(load|save)\(",
        "allow_pickle",
        r"\Weval\(",
    ):
        assert not re.search(word, code.replace(".eval()", "")), word
    run, _ = finished
    for path in run.rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:4]
            assert not start.startswith((b"\x80\x02", b"\x80\x04", b"PK")), path


def test_checkpoints_of_equal_runs_are_equal_files(train):
    a, b = train("a"), train("b")
    for name in ("model.safetensors", "optimizer.safetensors"):
        digests = [
            hashlib.sha256((run / "step-00000008" / name).read_bytes()).hexdigest()
            for run in (a, b)
        ]
        assert digests[0] == digests[1]


def test_only_the_newest_two_and_the_best_are_kept(train):
    run = train("run", "--steps=12", "--save_every=1", "--eval_every=3", "--decay=0")
    best = min((r for r in rows(run) if "val_loss" in r), key=lambda r: r["val_loss"])["step"]
    kept = {int(path.name[5:]) for path in checkpoint.checkpoints(run)}
    assert kept == {11, 12, best}


def test_the_lock_is_the_kernels(data, tmp_path):
    """A second process is refused while the first one lives, and not a moment longer."""
    import train

    process = start(data, tmp_path / "run", "--steps=100000")
    wait_for(lambda: read_metrics(tmp_path / "run"), process)
    with pytest.raises(ValueError, match="another process works in"):
        train.main(arguments(data, tmp_path / "run", "--steps=100000"))
    process.kill()
    process.wait()
    lock(tmp_path / "run").close()
