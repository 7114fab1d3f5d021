"""What users do wrong: each mistake gets one clear sentence and status 2, and damages nothing.

A case is a script, its arguments, what the sentence must name, and what is made ready before. It
runs in the folder that mistakes.py describes.
"""

import importlib
import json
import os
import shutil
import struct

import mistakes
import pytest
from mistakes import (
    BYTES,
    CHECKPOINT,
    HUGE,
    NOISE,
    RESUME,
    SAMPLE,
    TRAIN,
    both,
    check_mistake,
    cut,
    edit,
    flip,
    forge,
    gz,
    header,
    parquet,
    remove,
    torn_parquet,
    write,
)

place = mistakes.place


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

# mistakes that were found to be handled badly, each once
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

TABLE = PREPARE + CONFIG + TRAINING + RESUMING + SAMPLING + FORGED + PLOTTING + FOUND


def skip_for_packages(script: str, argv: list[str], named: list[str]) -> None:
    """Skips a test where an optional package is not installed, or is, though it should not."""
    if script == "plot":
        pytest.importorskip("matplotlib")
    for package in ("tensorboard", "wandb"):
        if package in str(named) and importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    if any(word.endswith(".parquet") for word in argv):
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("script, argv, named, ready", TABLE)
def test_mistake(script, argv, named, ready, place, monkeypatch, capsys):
    skip_for_packages(script, argv, named)
    if ready:
        ready()
    check_mistake(script, argv, named, monkeypatch, capsys)
