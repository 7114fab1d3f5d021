"""What users do wrong: each mistake gets one clear sentence and status 2, and damages nothing.

A case is a script, its arguments, what the sentence must name, and what is made ready before. It
runs in a folder that holds:

    docs/  one.txt   some documents, one document
    data/            docs, prepared as bytes
    run/             a tiny model of data, 4 steps, checkpoints after 2 and 4
    empty.py         a config file without settings

Afterwards that folder must hold the same names and bytes as before.
"""

import contextlib
import gc
import gzip
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from engine import settings

ROOT = Path(__file__).parent.parent
BYTES = ["--tokenizer=bytes", "--workers=1"]
TINY = "--steps=4 --eval_every=2 --save_every=2 --batch_tokens=256 --block_size=32 --n_layer=1"
TINY += " --n_embd=32 --n_head=2 --sample_tokens=0 --dtype=float32 --log_every=1 --device=cpu"
TRAIN = ["empty.py", "--data=data", "--out=new", *TINY.split()]  # a new run, but for the mistake
RESUME = ["empty.py", "--data=data", "--out=run", *TINY.split()]  # the run that is there
SAMPLE = ["run", "--max_tokens=2"]


# --- the world in which mistakes are made


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
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
def place(world, tmp_path, monkeypatch) -> Path:
    """A copy of the world, and the current folder for one test."""
    folder = tmp_path / "place"
    shutil.copytree(world, folder)
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


def skip_without_packages(script: str, argv: list[str]) -> None:
    """Skips a test of what needs an optional package, where that is not installed."""
    if script == "plot":
        pytest.importorskip("matplotlib")
    if any(word.endswith(".parquet") for word in argv):
        pytest.importorskip("pyarrow")


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


# --- the table: name, script, arguments, what must be named, what is made ready before


def case(name, script, argv, named, ready=None):
    return pytest.param(script, argv, [named] if isinstance(named, str) else named, ready, id=name)


def prepare(name, argv, named, ready=None):
    return case(f"prepare-{name}", "prepare", ["--out=new", *BYTES, *argv], named, ready)


def train(name, argv, named, ready=None):
    return case(f"train-{name}", "train", [*TRAIN, *argv], named, ready)


def config_file(name, content, named):
    argv = ["mine.py", *TRAIN[1:]]
    return case(f"config-{name}", "train", argv, named, write("mine.py", content))


def resume(name, argv, named, ready=None):
    return case(f"resume-{name}", "train", [*RESUME, *argv], named, ready)


def sample(name, argv, named, ready=None):
    return case(f"sample-{name}", "sample", [*SAMPLE, *argv], named, ready)


def plot(name, argv, named, ready=None):
    return case(f"plot-{name}", "plot", [*argv[:1], "--out=new.png", *argv[1:]], named, ready)


PREPARE = [
    prepare("no source", [], "no source"),
    prepare("missing file", ["nope.txt"], "'nope.txt'"),
    prepare("empty file", ["e.txt"], "e.txt", write("e.txt")),
    prepare("nothing but spaces", ["e.txt"], "e.txt", write("e.txt", " \n\t\n")),
    prepare("too short to split", ["e.txt"], "val", write("e.txt", "hi")),
    prepare("two documents for three splits", ["two"], "=0", write("two/a.txt", "hello")),
    prepare("latin-1", ["l.txt"], ["l.txt", "UTF-8"], write("l.txt", b"caf\xe9 au lait\n")),
    prepare("utf-16", ["u.txt"], ["u.txt", "--encoding=utf-16-le"],
            write("u.txt", "hello".encode("utf-16-le"))),
    prepare("cut character", ["c.txt"], ["c.txt", "UTF-8"], write("c.txt", "é".encode()[:1])),
    prepare("pattern without files", ["docs", "--pattern=*.tex"], ["docs", "--pattern=*.tex"]),
    prepare("jsonl without the field", ["r.jsonl"], ["r.jsonl, line 1", "body", "--field"],
            write("r.jsonl", '{"body": "a"}\n')),
    prepare("field that is not there", ["r.jsonl", "--field=txt"], ["'txt'", "text"],
            write("r.jsonl", '{"text": "a"}\n')),
    prepare("broken jsonl", ["r.jsonl"], ["r.jsonl, line 2", "JSON"],
            write("r.jsonl", '{"text": "a b"}\n{"text": oops\n')),
    prepare("jsonl of lists", ["r.jsonl"], "r.jsonl, line 1", write("r.jsonl", "[1, 2]\n")),
    prepare("jsonl in latin-1", ["r.jsonl"], "r.jsonl, line 1",
            write("r.jsonl", b'{"text": "caf\xe9 au lait"}\n')),
    prepare("truncated jsonl.gz", ["r.jsonl.gz"], ["r.jsonl.gz", "gzip"],
            write("r.jsonl.gz", gz(json.dumps({"text": NOISE}), 2000))),
    prepare("jsonl.gz that is no gzip", ["r.jsonl.gz"], ["r.jsonl.gz", "gzip"],
            write("r.jsonl.gz", '{"text": "a"}\n')),
    prepare("parquet that is none", ["r.parquet"], ["r.parquet", "parquet file"],
            write("r.parquet", b"PAR1 this is not")),
    prepare("empty parquet", ["r.parquet"], ["r.parquet", "parquet file"], write("r.parquet")),
    prepare("parquet without the column", ["r.parquet"], ["r.parquet", "'text'", "body"],
            parquet("r.parquet", body=["a", "b"])),
    prepare("val and test above 1", ["docs", "--val=0.6", "--test=0.5"], ["val=0.6", "test"]),
    prepare("val of 1", ["docs", "--val=1", "--test=0"], "val=1.0"),
    prepare("val below 0", ["docs", "--val=-0.1"], "val=-0.1"),
    prepare("val with a comma", ["docs", "--val=0,1"], "val='0,1'"),
    prepare("val not a number", ["docs", "--val=nan"], "val='nan'"),
    prepare("unknown tokenizer", ["docs", "--tokenizer=bpee"], ["'bpee'", "bytes"]),
    prepare("vocab_size too small", ["docs", "--tokenizer=bpe", "--vocab_size=256"],
            ["vocab_size=256", "257"]),
    prepare("bpe_bytes too small", ["docs", "--bpe_bytes=9"], "bpe_bytes=9"),
    prepare("part 0", ["docs", "--part=0/16"], ["part='0/16'", "3/16"]),
    prepare("part beyond the last", ["docs", "--part=17/16"], "part='17/16'"),
    prepare("no part", ["docs", "--part=x"], "part='x'"),
    prepare("a part learns its own", ["docs", "--part=2/3", "--tokenizer=bpe"],
            ["tokenizer='bpe'", "--part=1/3 --out=FOLDER"]),
    prepare("more parts than documents", ["one.txt", "--part=1/9999"], ["1 documents", "9999"]),
    prepare("canaries in a part", ["docs", "--part=1/3", "--canaries=9"], ["canaries=9", "--part"]),
    prepare("likeness of 1", ["docs", "--near=1"], "near=1.0"),
    prepare("no likeness", ["docs", "--near=0.01"], "near=0.01 should be 0 (off), or from 0.1"),
    prepare("likeness of rows", ["r.csv", "--prompt=a", "--answer=b", "--near=0.8"],
            ["near=0.8", "rows"], write("r.csv", "a,b\nx,y\n")),
    prepare("another part is there", ["docs", "--out=data", "--part=1/2"],
            ["data", "part", "--overwrite"]),
    prepare("workers below 0", ["docs", "--workers=-2"], "workers=-2"),
    prepare("seed below 0", ["docs", "--seed=-1"], "seed=-1"),
    prepare("overwrite=maybe", ["docs", "--overwrite=maybe"], ["overwrite='maybe'", "true"]),
    prepare("typo in a flag", ["docs", "--overwrit"], ["'overwrit'", "did you mean overwrite?"]),
    prepare("out is a file", ["docs", "--out=one.txt"], ["one.txt", "--out"]),
    prepare("out below a file", ["docs", "--out=one.txt/new"], "one.txt"),
    prepare("out is the folder of the text", ["docs", "--out=docs"], ["docs", "--out"]),
    prepare("out is a run", ["docs", "--out=run"], ["run", "--out"]),
    prepare("made with other settings", ["docs", "--out=data"], ["data", "val", "--overwrite"]),
    prepare("made from another source", ["one.txt", "--out=data"], ["data", "source", "0.2"]),
]  # fmt: skip

CONFIG = [
    case("config-typo in its name", "train", ["config/smal.py"], "'config/smal.py'"),
    case("config-a folder", "train", ["docs"], "'docs'"),
    config_file("typo", "n_layers = 3\n", ["mine.py", "'n_layers'", "did you mean n_layer?"]),
    config_file("syntax error", "n_layer = (3\n", ["mine.py", "SyntaxError", "line 1"]),
    config_file("error", "steps = 1 / 0\n", ["mine.py", "division by zero"]),
    config_file("wrong type", 'n_layer = "three"\n', ["mine.py", "n_layer='three'"]),
    config_file("a list", "steps = [4]\n", ["mine.py", "[4]"]),
    config_file("none", "dropout = None\n", ["mine.py", "None"]),
    config_file("yes for true", 'tied = "yes"\n', ["mine.py", "tied='yes'", "true or false"]),
    config_file("not UTF-8", b"steps = 4  # \xff\n", "mine.py"),
    config_file("json inside", '{"n_layer": 3}', ["mine.py", "line 1 assigns nothing"]),
    config_file("yaml inside", "n_layer: 3\n", ["mine.py", "line 1 assigns nothing"]),
    config_file("a comparison", "tied = True\nn_layer == 3\n", ["mine.py", "line 2"]),
    case(
        "config-json",
        "train",
        ["mine.json", *TRAIN[1:]],
        ["mine.json", ".py"],
        write("mine.json", '{"n_layer": 3}'),
    ),
    config_file("beyond a bound", "dropout = 1\n", ["mine.py", "dropout=1.0", "below 1"]),
    config_file("zero bytes", b"steps = 4\0", "mine.py"),
]

TRAINING = [
    train("typo in a flag", ["--n_layr=3"], ["'n_layr'", "did you mean n_layer?"]),
    train("unknown flag", ["--zzzzzz=3"], ["'zzzzzz'", "--help"]),
    train("two config files", ["other.py"], "'other.py'"),
    train("flag without its value", ["--steps"], "--steps"),
    train("word for a number", ["--n_layer=three"], "n_layer='three'"),
    train("fraction for a whole number", ["--n_layer=2.5"], "n_layer='2.5'"),
    train("nothing for a number", ["--n_layer="], "n_layer=''"),
    train("no steps", ["--steps=0"], "steps=0"),
    train("negative steps", ["--steps", "-3"], "steps=-3"),
    train("no layers", ["--n_layer=0"], "n_layer=0"),
    train("width not divisible by heads", ["--n_embd=33"], ["n_embd=33", "n_head=2"]),
    train("odd head size", ["--n_embd=6"], ["n_embd=6", "even"]),
    train("odd head_dim", ["--head_dim=7"], ["head_dim=7", "even"]),
    train("heads of keys", ["--n_kv_head=3"], ["n_kv_head=3", "n_head=2"]),
    train("batch that does not divide", ["--batch_tokens=100"], ["batch_tokens=100", "96"]),
    train("batch below one window", ["--batch_tokens=8"], ["batch_tokens=8", "32"]),
    train("dropout of 1", ["--dropout=1"], "dropout=1.0"),
    train("negative lr", ["--lr=-1"], "lr=-1.0"),
    train("lr not a number", ["--lr=nan"], "lr='nan'"),
    train("warmup above steps", ["--warmup=50"], ["warmup=50", "steps=4"]),
    train("absurdly many layers", ["--n_layer=1000000"], ["n_layer=1000000", "10,000"]),
    train("absurdly wide", ["--n_embd=4000000"], ["4000000", "GB", "smaller"]),
    train("absurd lr", ["--lr=1e30"], ["lr=1e+30", "1000"]),
    train("show_batch beyond the last step", ["--show_batch=5"], ["show_batch=5", "steps=4"]),
    train("init_from itself", ["--out=run", "--init_from=run"], ["init_from", "--out"]),
    train("init_from a step of itself", ["--out=run", f"--init_from={CHECKPOINT}"], "init_from"),
    train("a tokenizer beside meta.json", ["--tokenizer=gpt2"], ["tokenizer='gpt2'", "data"]),
    train("threads", ["--threads=none"], ["threads='none'", "auto"]),
    train("unknown optimizer", ["--optimizer=sgd"], ["'sgd'", "muon"]),
    train("LoRA without weights", ["--lora_rank=4"], ["lora_rank=4", "--init_from"]),
    train("LoRA of full rank", ["--lora_rank=32", "--init_from=run"], ["lora_rank=32", "32"]),
    train("LoRA on unknown matrices", ["--lora_on=wq"], ["'wq'", "qv, attention, all"]),
    sample("unknown quantisation", ["--quantize=int4"], ["'int4'", "int8"]),
    train("sharded alone", ["--shard"], ["shard=True", "torchrun"]),
    train("sharded LoRA", ["--shard", "--lora_rank=4", "--init_from=run"], "--lora_rank"),
    train("sharded objective", ["--shard", "--objective=reward"], ["shard=True", "reward"]),
    train("sharded gradients", ["--shard", "--adversarial=1"], ["shard=True", "--adversarial"]),
    train("device_batch", ["--device_batch=all"], ["device_batch='all'", "auto or a whole number"]),
    train("negative device_batch", ["--device_batch=-1"], ["device_batch=-1", "auto or at least"]),
    train("device_batch by itself", ["--device_batch=auto", "--objective=reward"], "'auto'"),
    train("unknown schedule", ["--schedule=step"], ["'step'", "cosine"]),
    train("unknown split", ["--eval_only", "--split=tset"], ["'tset'", "test"]),
    train("negative seed", ["--seed=-1"], "seed=-1"),
    train("unknown dtype", ["--dtype=float8"], ["'float8'", "bfloat16"]),
    train("unknown device", ["--device=gpu"], ["'gpu'", "cpu"]),
    train("compile=maybe", ["--compile=maybe"], "'maybe'"),
    train("no data", ["--data=nope"], ["nope", "prepare.py"]),
    train("data is a file", ["--data=one.txt"], ["one.txt", "prepare.py"]),
    train("parts with vocabularies of their own", ["--data=data,two"], ["two", "--tokenizer="],
          lambda: importlib.import_module("prepare").main(
              ["docs", "--out=two", "--vocab_size=257", "--part=1/2", "--workers=1"])),
    train("data not prepared", ["--data=docs"], ["docs", "prepare.py"]),
    train("text shorter than a window", ["--block_size=65536", "--batch_tokens=65536"],
          ["data", "65537", "block_size"]),
    train("empty meta.json", [], "meta.json", write("data/meta.json")),
    train("cut meta.json", [], "meta.json", cut("data/meta.json", 100)),
    train("meta.json of another kind", [], "meta.json", write("data/meta.json", "[]")),
    train("missing meta.json", [], "meta.json", remove("data/meta.json")),
    train("missing encoding.json", [], "encoding.json", remove("data/encoding.json")),
    train("missing vocab.tiktoken", [], "vocab.tiktoken", remove("data/vocab.tiktoken")),
    train("empty encoding.json", [], "tokenizer files in data", write("data/encoding.json")),
    train("changed vocab.tiktoken", [], "tokenizer files in data",
          write("data/vocab.tiktoken", "AA== 0\nAQ== 1\n")),
    train("missing shard", [], "train_000000.bin", remove("data/train_000000.bin")),
    train("missing val shard", [], "val_000000.bin", remove("data/val_000000.bin")),
    train("cut shard", [], ["train_000000.bin", "damaged"], cut("data/train_000000.bin", 2000)),
    train("empty shard", [], ["train_000000.bin", "damaged"], cut("data/train_000000.bin", 0)),
    train("changed shard", [], ["val_000000.bin", "damaged"], flip("data/val_000000.bin", 1100)),
    train("changed header", [], ["train_000000.bin", "damaged"],
          flip("data/train_000000.bin", 0)),
    train("shards without vocabulary", ["--data=data"], "--tokenizer",
          both(*(remove(f"data/{n}") for n in
                 ("meta.json", "encoding.json", "vocab.tiktoken")))),
    train("out is a file", ["--out=one.txt"], "one.txt"),
    train("out below a file", ["--out=one.txt/new"], "one.txt"),
    train("eval_only without a run", ["--eval_only"], "'new'"),
]  # fmt: skip

RESUMING = [
    resume("other lr", ["--lr=0.5", "--steps=8"], ["lr was 0.02", "0.5", "--out"]),
    resume("other model", ["--n_embd=64"], ["n_embd was 32", "64", "--out"]),
    resume("other seed when done", ["--seed=7"], ["seed was 1", "7", "--out"]),
    resume("data exchanged", ["--steps=8"], ["data", CHECKPOINT],
           lambda: (shutil.rmtree("data"), importlib.import_module("prepare").main(
               ["one.txt", "--out=data", *BYTES]))),
    resume("data damaged", ["--steps=8"], "train_000000.bin",
           flip("data/train_000000.bin", 2000)),
    resume("data gone", ["--steps=8"], "data", remove("data")),
    resume("metrics cut short", ["--steps=8"], "run/metrics", cut("run/metrics.jsonl", 50)),
    resume("metrics changed", ["--steps=8"], "run/metrics", flip("run/metrics.jsonl", 20)),
    resume("eval_only of a missing split", ["--eval_only", "--split=test"], "test",
           remove("data/test_000000.bin")),
    resume("eval_only damaged", ["--eval_only"], "model.safetensors",
           flip("run/step-00000004/model.safetensors", 3000)),
]  # fmt: skip

SAMPLING = [
    case("sample-missing run", "sample", ["nope"], "'nope'"),
    case("sample-a file", "sample", ["one.txt"], "'one.txt'"),
    case("sample-folder without checkpoint", "sample", ["data"], ["data", "checkpoint"]),
    sample("no such step", ["--checkpoint=step-99999999"], ["'step-99999999'", "step-00000002"]),
    sample("negative temperature", ["--temperature=-1"], "temperature=-1.0"),
    sample("temperature not a number", ["--temperature=warm"], "temperature='warm'"),
    sample("top_p 0", ["--top_p=0"], "top_p=0.0"),
    sample("top_p above 1", ["--top_p=1.5"], "top_p=1.5"),
    sample("negative top_k", ["--top_k=-1"], "top_k=-1"),
    sample("negative max_tokens", ["--max_tokens=-1"], "max_tokens=-1"),
    sample("no samples", ["--num_samples=0"], "num_samples=0"),
    sample("empty stop", ["--stop="], "stop"),
    sample("prompt and prompt_file", ["--prompt=a", "--prompt_file=one.txt"],
           ["prompt", "prompt_file"]),
    sample("missing prompt_file", ["--prompt_file=nope.txt"], "nope.txt"),
    sample("prompt_file is a folder", ["--prompt_file=docs"], "docs"),
    sample("unknown device", ["--device=gpu"], ["'gpu'", "cpu"]),
    sample("unknown dtype", ["--dtype=int8"], ["'int8'", "float32"]),
    sample("two runs", ["run"], "'run'"),
    sample("typo in a flag", ["--temprature=1"], "did you mean temperature?"),
    sample("cut model", [], ["model.safetensors", "damaged"],
           cut(f"{CHECKPOINT}/model.safetensors", 3000)),
    sample("changed model", [], ["model.safetensors", "damaged"],
           flip(f"{CHECKPOINT}/model.safetensors", 3000)),
    sample("missing model", [], ["model.safetensors", "damaged"],
           remove(f"{CHECKPOINT}/model.safetensors")),
    sample("missing state.json", [], ["state.json", "damaged"], remove(f"{CHECKPOINT}/state.json")),
    sample("changed vocabulary", [], ["vocab.tiktoken", "damaged"],
           flip(f"{CHECKPOINT}/vocab.tiktoken", 9)),
    sample("empty manifest", [], [CHECKPOINT, "damaged"], write(f"{CHECKPOINT}/manifest.json")),
    sample("missing manifest", [], [CHECKPOINT, "manifest.json"],
           remove(f"{CHECKPOINT}/manifest.json")),
]  # fmt: skip

# files that somebody has made: size and digest are right
FORGED = [
    sample(f"forged {name}", [], [CHECKPOINT, file], forge(file, content))
    for name, file, content in (
        ("state: a list", "state.json", b"[]"),
        ("state: no JSON", "state.json", b"{"),
        ("state: nested", "state.json", b"[" * 100_000),
        ("state: no model", "state.json", lambda state: state.pop("model")),
        ("state: a word for a number", "state.json", lambda s: s["model"].update(n_layer="two")),
        ("state: unknown name", "state.json", lambda s: s["model"].update(n_layers=2)),
        ("state: layers", "state.json", lambda s: s["model"].update(n_layer=10**9)),
        ("state: context", "state.json", lambda s: s["model"].update(block_size=10**12)),
        ("weights: gigabytes", "model.safetensors", header(**{"wte.weight": HUGE})),
        ("weights: long header", "model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
        ("weights: none", "model.safetensors", header()),
    )
]
FORGED += [
    sample("forged state: another shape", [], [CHECKPOINT, "model.safetensors", "shape"],
           forge("state.json", lambda s: s["model"].update(mlp_dim=10**9))),
]  # fmt: skip
FORGED += [
    resume(f"forged {name}", ["--steps=8"], [CHECKPOINT, file], forge(file, content))
    for name, file, content in (
        ("state", "state.json", lambda s: s.update(settings=[])),
        ("optimizer", "optimizer.safetensors", header(**{"wte.weight/exp_avg": HUGE})),
    )
]

PLOTTING = [
    plot("no run", [], "runs"),
    plot("missing run", ["nope"], "nope"),
    plot("folder without metrics", ["data"], ["data", "metrics.jsonl"]),
    plot("empty metrics", ["run"], "metrics.jsonl", write("run/metrics.jsonl")),
    plot("unknown axis", ["run", "--x=epoch"], ["x='epoch'", "tokens"]),
    plot("smooth of 1", ["run", "--smooth=1"], "smooth=1.0"),
    plot("out in a missing folder", ["run", "--out=nope/a.png"], "nope/a.png"),
    plot("unknown picture format", ["run", "--out=a.xyz"], "xyz"),
]

TABLE = PREPARE + CONFIG + TRAINING + RESUMING + SAMPLING + FORGED + PLOTTING


@pytest.mark.parametrize("script, argv, named, ready", TABLE)
def test_mistake(script, argv, named, ready, place, monkeypatch, capsys):
    skip_without_packages(script, argv)
    if ready:
        ready()
    check_mistake(script, argv, named, monkeypatch, capsys)


# --- mistakes that were found to be handled badly, each once


FOUND = [
    # a corrupt gzip raises zlib.error; a plain text is read outside the `try` of file_documents
    prepare("corrupt gzip", ["r.txt.gz"], "r.txt.gz", write("r.txt.gz", gz(NOISE, None, 500))),
    prepare("corrupt jsonl.gz", ["r.jsonl.gz"], "r.jsonl.gz",
            write("r.jsonl.gz", gz(json.dumps({"text": NOISE}), None, 500))),
    prepare("truncated txt.gz", ["r.txt.gz"], "r.txt.gz", write("r.txt.gz", gz(NOISE, 1500))),
    prepare("txt.gz that is no gzip", ["r.txt.gz"], "r.txt.gz", write("r.txt.gz", "plain text")),
    prepare("parquet damaged inside", ["r.parquet"], "r.parquet", torn_parquet("r.parquet")),
    prepare("parquet column of numbers", ["r.parquet", "--val=0", "--test=0"], "r.parquet",
            parquet("r.parquet", text=[[1, 2], [3]])),
    prepare("deeply nested json", ["r.jsonl"], "r.jsonl, line 1", write("r.jsonl", "[" * 200_000)),
    prepare("symlink to itself", ["loop"], "loop", lambda: os.symlink("loop", "loop")),
    prepare("folders left above out", ["nope.txt", "--out=a/b/c"], "nope.txt"),
    case("prepare-no arguments", "prepare", [], "no source"),
    case("plot-no arguments", "plot", [], "runs"),
    case("sample-no run where none is named", "sample", [], "'out/small'"),
    train("cut vocab.tiktoken", [], "tokenizer files in data", cut("data/vocab.tiktoken", 500)),
    train("init_from nothing", ["--init_from=nope"], "'nope'"),
    train("init_from as in nanoGPT", ["--init_from=gpt2-xl"], ["'gpt2-xl'", "huggingface.py"]),
    train("init_from as nanoGPT has it", ["--init_from=scratch"], ["'scratch'", "leave it out"]),
    train("init_from a data set", ["--init_from=data"], "data"),
    train("init_from another tokenizer", ["--init_from=run", "--data=other"],
          ["run reads bytes", "python prepare.py docs --val=0.2 --test=0.0", "--tokenizer=run"],
          lambda: importlib.import_module("prepare").main(
              ["docs", "--out=other", "--vocab_size=260", "--val=0.2", "--test=0"])),
    case("plot-row that is no object", "plot", ["run", "--out=new.png"], "metrics.jsonl",
         write("run/metrics.jsonl", "5\n")),
    case("plot-row without tokens", "plot", ["run", "--out=new.png"], "metrics.jsonl",
         write("run/metrics.jsonl", '{"loss": 1.0}\n')),
    config_file("exit", "raise SystemExit(5)\n", "mine.py"),
    config_file("huge number", "steps = 10**400\n", "steps="),
    train("infinite lr", ["--lr=inf"], "inf"),
    train("infinite norm_eps", ["--norm_eps=inf"], "inf"),
    train("seed beyond 64 bits", ["--seed=1e30"], "seed="),
    train("device with a bad number", ["--device=cpu:foo"], "cpu:foo"),
    train("meta.json with a list of splits", [], "meta.json",
          edit("data/meta.json", '"splits": {', '"splits": [], "x": {')),
    train("meta.json with a number for a file", [], "data",
          edit("data/meta.json", '"train_000000.bin"', "5")),
    train("meta.json with a word for bytes", [], "meta.json",
          edit("data/meta.json", '"bytes": ', '"bytes": "x", "y": ')),
    train("vocabulary with one rank twice", [], "tokenizer files in data",
          edit("data/vocab.tiktoken", "AA== 0\n", "AA== 1\n")),
    train("vocabulary with a negative rank", [], "tokenizer files in data",
          edit("data/vocab.tiktoken", "AA== 0\n", "AA== -1\n")),
    train("missing meta.json, misleading remedy", [], "prepare the data again",
          remove("data/meta.json")),
    train("out is a folder of other things", ["--out=docs"], "docs"),
    train("out is a data set", ["--out=data"], "data"),
    train("no tensorboard", ["--tensorboard"], "tensorboard"),
    train("no wandb", ["--wandb=proj"], ["wandb", "pip install wandb"]),
    sample("metrics row that is no object", ["--checkpoint=nope"], "'nope'",
           write("run/metrics.jsonl", "5\n")),
    sample("manifest without the model", [], "manifest.json",
           write(f"{CHECKPOINT}/manifest.json", "{}")),
]  # fmt: skip


@pytest.mark.parametrize("script, argv, named, ready", FOUND)
def test_mistake_found(script, argv, named, ready, place, monkeypatch, capsys):
    skip_without_packages(script, argv)
    for package in ("tensorboard", "wandb"):
        if package in str(named) and importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    if ready:
        ready()
    check_mistake(script, argv, named, monkeypatch, capsys)


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
    argv = [sys.executable, str(ROOT / "sample.py"), "run", "--max_tokens=1000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head -1` does, a little later
        assert process.wait(timeout=60) == 141  # as the shell has it
        assert process.stderr.read() == b""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX only")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_found_prepare_stopped_leaves_nothing(name, status, place):
    """Also when only the main process is told: its workers must not stay behind."""
    lines = Path("one.txt").read_text(encoding="utf-8")
    Path("one.txt").write_text("".join(f"{i} {lines}" for i in range(500)), encoding="utf-8")
    before = contents(place)
    argv = [sys.executable, str(ROOT / "prepare.py"), "one.txt", "--out=new", *BYTES]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, start_new_session=True)
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
