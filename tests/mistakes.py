"""The world in which mistakes are made, ways to spoil it, and what each gets: a clear sentence and
status 2. A test of a mistake runs in a copy of a folder that holds:

    docs/  one.txt   some documents, one document
    data/            docs, prepared as bytes
    run/             a tiny model of data, 4 steps, checkpoints after 2 and 4
    empty.py         a config file without settings

Afterwards that folder must hold the same names and bytes as before.
"""

import functools
import gzip
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest

from engine import settings

BYTES = ["--tokenizer=bytes", "--workers=1"]
TINY = "--steps=4 --eval_every=2 --save_every=2 --batch_tokens=256 --block_size=32 --n_layer=1"
TINY += " --n_embd=32 --n_head=2 --sample_tokens=0 --dtype=float32 --log_every=1 --device=cpu"
TRAIN = ["empty.py", "--data=data", "--out=new", *TINY.split()]  # a new run, but for the mistake
RESUME = ["empty.py", "--data=data", "--out=run", *TINY.split()]  # the run that is there
SAMPLE = ["run", "--max_tokens=2"]


# --- the world in which mistakes are made


@functools.cache  # one for all files
def made(folder: Path) -> Path:
    folder.mkdir()
    rng = random.Random(0)
    lines = ["".join(rng.choices(["sun ", "moon ", "är ", "a "], k=8)) + "\n" for _ in range(600)]
    (folder / "docs").mkdir()
    for i in range(30):
        (folder / "docs" / f"{i}.txt").write_text("".join(lines[20 * i :][:20]), encoding="utf-8")
    (folder / "one.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "empty.py").write_text("")
    here = Path.cwd()
    os.chdir(folder)
    try:
        prepare = ["docs", "--out=data", "--val=0.2", "--test=0.1", *BYTES]
        importlib.import_module("prepare").main(prepare)
        with same_signals():
            importlib.import_module("train").main(RESUME)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch) -> Path:
    """A copy of the world, and the current folder for one test."""
    folder = tmp_path / "place"
    shutil.copytree(made(tmp_path_factory.getbasetemp() / "world"), folder)
    monkeypatch.chdir(folder)
    return folder


class same_signals:
    """train.py takes over the signals of its process, which here is pytest."""

    def __enter__(self):
        names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
        self.before = {n: signal.getsignal(getattr(signal, n)) for n in names}

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler)


def run(script: str, argv: list[str], monkeypatch) -> int:
    """Runs a script in this process, as its last line does; returns the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with same_signals(), pytest.raises(SystemExit) as ended:
        settings.run(importlib.import_module(script).main)
    return ended.value.code or 0


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: name to bytes, None for a folder."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def check_sentence(stderr: str, script: str, *named: str) -> None:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith(f"{script}.py: error: "), stderr
    assert len(lines[0]) <= 400, "overlong"
    for name in named:
        assert name in lines[0], f"{name!r} is not named in: {lines[0]}"


def check_mistake(script, argv, named, monkeypatch, capsys) -> None:
    before = contents(Path())
    capsys.readouterr()
    status = run(script, argv, monkeypatch)
    captured = capsys.readouterr()
    assert status == 2, captured.out + captured.err
    check_sentence(captured.err, script, *named)
    after = contents(Path())
    left, lost = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    assert not left, f"left behind: {left}"
    assert not lost, f"lost: {lost}"
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"changed: {changed}"


# --- ways to spoil a file


def write(path: str, content: str | bytes = b""):
    data = content.encode() if isinstance(content, str) else content

    def make():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    return make


def remove(path: str):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def cut(path: str, size: int):
    return lambda: os.truncate(path, size)


def flip(path: str, position: int):
    """Inverts one byte."""

    def make():
        content = bytearray(Path(path).read_bytes())
        content[position] ^= 0xFF
        Path(path).write_bytes(content)

    return make


def edit(path: str, old: str, new: str):
    def make():
        text = Path(path).read_text(encoding="utf-8")
        assert old in text
        Path(path).write_text(text.replace(old, new), encoding="utf-8")

    return make


def both(*steps):
    return lambda: [step() for step in steps]


def gz(text: str, size: int | None = None, spoil: int | None = None) -> bytes:
    content = bytearray(gzip.compress(text.encode(), mtime=0)[:size])
    if spoil is not None:
        content[spoil] ^= 0xFF
    return bytes(content)


def parquet(path: str, **columns):
    def make():
        pa = pytest.importorskip("pyarrow")
        importlib.import_module("pyarrow.parquet").write_table(pa.table(columns), path)

    return make


def torn_parquet(path: str):
    """Whole at its end, where the schema is, and spoiled in the middle."""

    def make():
        pa = pytest.importorskip("pyarrow")
        rows = {"text": [f"row number {i}, some text" for i in range(3000)]}
        options = dict(compression="none", use_dictionary=False)
        importlib.import_module("pyarrow.parquet").write_table(pa.table(rows), path, **options)
        content = bytearray(Path(path).read_bytes())
        content[200:600] = b"\xaa" * 400
        Path(path).write_bytes(content)

    return make


def forge(file: str, content):
    """Replaces a file of the newest checkpoint, or changes its JSON, and its manifest agrees."""

    def make():
        path = Path(CHECKPOINT) / file
        if callable(content):
            state = json.loads(path.read_text())
            content(state)
            path.write_text(json.dumps(state))
        else:
            path.write_bytes(content)
        manifest = json.loads((Path(CHECKPOINT) / "manifest.json").read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest[file] = dict(size=path.stat().st_size, sha256=digest)
        (Path(CHECKPOINT) / "manifest.json").write_text(json.dumps(manifest))

    return make


def header(**tensors) -> bytes:
    """A safetensors file that has nothing but its header."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = dict(dtype="F32", shape=[10**9, 4], data_offsets=[0, 16 * 10**9])
NOISE = "".join(random.Random(1).choices("abcdefghij \n", k=5000))
CHECKPOINT = "run/step-00000004"
