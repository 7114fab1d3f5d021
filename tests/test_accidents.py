"""Full disks, damage, folders of other people, processes that are stopped: nothing is lost.

Each test runs in the folder that mistakes.py describes.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import mistakes
import pytest
from conftest import ROOT
from mistakes import (
    BYTES,
    CHECKPOINT,
    RESUME,
    SAMPLE,
    TRAIN,
    check_mistake,
    check_sentence,
    contents,
    flip,
    parquet,
    run,
    write,
)

place = mistakes.place


def test_no_cuda(place, monkeypatch, capsys):
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for script, argv in (("train", TRAIN), ("sample", SAMPLE)):
        argv = [*argv, "--device=cuda"]
        check_mistake(script, argv, ["'cuda'", "cpu"], monkeypatch, capsys)


def test_two_runs_in_one_folder(place, monkeypatch, capsys):
    handle = importlib.import_module("engine.resume").lock(Path("run"))
    check_mistake("train", [*RESUME, "--steps=8"], ["another process", "run"], monkeypatch, capsys)
    handle.close()


def test_a_folder_that_may_not_be_written(place, monkeypatch, capsys):
    Path("closed").mkdir(mode=0o500)
    try:
        if os.access("closed", os.W_OK):
            pytest.skip("root may write everywhere")
        check_mistake("prepare", ["docs", "--out=closed/a", *BYTES], "closed", monkeypatch, capsys)
        check_mistake("train", [*TRAIN, "--out=closed/a"], "closed", monkeypatch, capsys)
    finally:
        Path("closed").chmod(0o700)


def test_full_disk_while_training(place, monkeypatch, capsys):
    before = contents(Path("run"))
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert run("train", [*RESUME, "--steps=8"], m) == 2
    check_sentence(capsys.readouterr().err, "train", "disk", "MB")
    gc.collect()  # in one process, the traceback would keep the lock of the run
    after = contents(Path("run"))
    kept = [name for name in before if name.startswith("step-")]
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    assert not [name for name in after if "partial" in name]
    assert run("train", [*RESUME, "--steps=8"], monkeypatch) == 0  # with room, it goes on
    assert "resumed from step 4" in capsys.readouterr().out


def test_damaged_checkpoint_is_set_aside(place, monkeypatch, capsys):
    """It is named, and training goes on from the one before."""
    flip(f"{CHECKPOINT}/model.safetensors", 3000)()
    assert run("train", RESUME, monkeypatch) == 0
    captured = capsys.readouterr()
    assert "step-00000004.corrupt" in captured.out + captured.err
    assert "resumed from step 2" in captured.out


def test_found_all_checkpoints_damaged_starts_afresh(place, monkeypatch, capsys):
    """Promise 2: "it never silently starts afresh"; and the diary is not thrown away."""
    metrics = Path("run/metrics.jsonl").read_bytes()
    for step in (2, 4):
        flip(f"run/step-0000000{step}/model.safetensors", 3000)()
    assert run("train", RESUME, monkeypatch) == 2
    check_sentence(capsys.readouterr().err, "train", "run", "--fresh")
    assert Path("run/metrics.jsonl").read_bytes() == metrics
    assert not checkpoint_folders()


def checkpoint_folders() -> list[Path]:
    return [p for p in Path("run").glob("step-*") if p.suffix != ".corrupt"]


def test_found_a_run_deletes_what_is_not_its_own(place, monkeypatch, capsys):
    """--out=. or --out=data must not take other people's *.old and *.partial for its leftovers."""
    write("docs/thesis.old", "years of work")()
    write("docs/archive.old/notes.txt", "more years")()
    write("docs/python.partial/spool_train", "being prepared")()
    before = contents(Path("docs"))
    run("train", [*TRAIN, "--out=docs"], monkeypatch)
    after = contents(Path("docs"))
    assert {name: after.get(name) for name in before} == before


def test_found_fresh_moves_a_folder_that_is_no_run(place, monkeypatch, capsys):
    run("train", [*TRAIN, "--out=docs", "--fresh"], monkeypatch)
    assert Path("docs/0.txt").exists(), "the user's own folder was renamed"


def test_found_val_0_of_one_document_still_has_a_val_split(place, monkeypatch):
    argv = ["one.txt", "--val=0", "--test=0.1", "--out=new", *BYTES]
    assert run("prepare", argv, monkeypatch) == 0
    meta = json.loads(Path("new/meta.json").read_text(encoding="utf-8"))
    assert meta["splits"]["val"]["bytes"] == 0


def test_found_one_document_without_line_ends_is_split(place, monkeypatch, capsys):
    """text8, for one, is a single line of 100 MB."""
    write("line.txt", "some words " * 2000)()
    status = run("prepare", ["line.txt", "--out=new", *BYTES], monkeypatch)
    assert status == 0, capsys.readouterr().err


def test_found_binary_parquet_columns_become_python_literals(place, monkeypatch):
    parquet("r.parquet", text=["some café".encode()] * 3)()
    argv = ["r.parquet", "--val=0", "--test=0", "--out=new", *BYTES]
    if run("prepare", argv, monkeypatch) == 0:  # or refused
        assert b"b\0'\0" not in Path("new/train_000000.bin").read_bytes()


def test_found_plot_draws_two_runs_of_one_name(place, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    shutil.copytree("run", "other/run")
    drawn = []
    real = plt.Axes.plot
    monkeypatch.setattr(plt.Axes, "plot", lambda *a, **k: drawn.append(k) or real(*a, **k))
    assert run("plot", ["run", "other/run", "--out=new.png"], monkeypatch) == 0
    assert len(drawn) == 4  # a training and a validation curve of each


def test_found_plot_takes_runs_behind_settings(place, monkeypatch):
    pytest.importorskip("matplotlib")
    shutil.copytree("run", "other")
    assert run("plot", ["run", "--out=new.png", "other"], monkeypatch) == 0


# --- in a process of its own


def script(name: str, *argv: str, prelude: str = "", **options):
    """Runs a script; `prelude` is Python that its process runs first."""
    command = [sys.executable, str(ROOT / name), *argv]
    if prelude:
        text = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); {prelude}; "
        text += f"sys.argv = {[name, *argv]!r}; "
        text += f"runpy.run_path({str(ROOT / name)!r}, run_name='__main__')"
        command = [sys.executable, "-c", text]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.run(command, encoding="utf-8", timeout=60, **pipes | options)


@pytest.mark.parametrize(
    "name, argv, named",
    [
        ("prepare", ["nope.txt", "--out=new"], "'nope.txt'"),
        ("train", ["empty.py", "--n_layr=3"], "did you mean n_layer?"),
        ("sample", ["run", "--top_p=0"], "top_p=0.0"),
        ("plot", ["data"], "data"),
    ],
)
def test_mistake_in_a_process(name, argv, named, place):
    before = contents(place)
    done = script(f"{name}.py", *argv)
    assert done.returncode == 2, done.stdout + done.stderr
    check_sentence(done.stderr, name, named)
    assert contents(place) == before


def test_mistakes_are_answered_before_torch_is_imported(place):
    prelude = "sys.modules['torch'] = None"  # importing it would fail
    for name, argv in (("train.py", [*TRAIN, "--n_embd=33"]), ("sample.py", ["run", "--top_k=-1"])):
        done = script(name, *argv, prelude=prelude)
        assert done.returncode == 2, done.stderr


def test_full_disk_while_preparing(place):
    resource = pytest.importorskip("resource")
    before = contents(place)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    del resource
    done = script("prepare.py", "one.txt", "--out=new", *BYTES, prelude=limit)
    assert done.returncode == 2, done.stderr
    check_sentence(done.stderr, "prepare", "File too large")
    assert contents(place) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_output_that_cannot_be_written(place):
    pytest.importorskip("matplotlib")
    with open("/dev/full", "w") as full:
        done = script("plot.py", "run", "--out=new.png", stdout=full)
    assert done.returncode == 2
    check_sentence(done.stderr, "plot", "No space left")


def test_a_reader_that_has_seen_enough(place):
    apart = functools.partial(errors_into, place / "errors.txt")
    process = forked.Forked("sample.py", place / "run", "--max_tokens=1000", before=apart)
    process.stdout.close()  # as `| head -1` does, a little later
    assert process.wait() == 141  # as the shell has it
    assert (place / "errors.txt").read_text() == ""


def errors_into(path: Path) -> None:
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX only")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_found_prepare_stopped_leaves_nothing(name, status, place):
    """Also when only the main process is told: its workers must not stay behind."""
    lines = Path("one.txt").read_text(encoding="utf-8")
    Path("one.txt").write_text("".join(f"{i} {lines}" for i in range(2000)), encoding="utf-8")
    before = contents(place)
    argv = [sys.executable, str(ROOT / "prepare.py"), "one.txt", "--out=new", *BYTES]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so behind an &
    process = subprocess.Popen(
        argv, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heard
    )
    for _ in range(400):  # until the workers are at it
        if Path("new.partial/new/train_000000.bin").exists():
            break
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        break
    assert process.poll() is None, "too quick for this test"
    process.send_signal(getattr(signal, name))
    try:
        # the pipe ends when the last process that holds it does
        assert b"Traceback" not in process.communicate(timeout=3)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (status, status - 128, 128 - status)
    assert contents(place) == before
