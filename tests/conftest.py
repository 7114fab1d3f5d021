"""What the tests share: one small text, one prepared data set, one way to train."""

import gc
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
CODE = [
    path
    for room in ("", "engine", "lessons", "objectives", "tasks")
    for path in (ROOT / room).glob("*.py")
]  # no tests
sys.path.insert(0, str(ROOT))
os.environ.pop("PYTHONUNBUFFERED", None)  # as on most machines
os.environ["LC_ALL"] = "C.UTF-8"  # learn.py speaks the machine's language
os.environ["OMP_NUM_THREADS"] = "1"  # here and in subprocesses: equal bits, and small work anyway

# a tiny model and a short run; tests add what they need
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_tokens=256"]
TINY += ["--steps=8", "--eval_every=4", "--save_every=4", "--log_every=1", "--sample_tokens=0"]
TINY += ["--dtype=float32"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="of all runs: cpu, or cuda if there is a GPU")


def pytest_configure(config):
    """Runs on the CPU even where there is a GPU, unless a GPU is asked for."""
    gc.disable()  # what is imported stays
    device = config.getoption("--device")
    TINY.append(f"--device={device}")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for scripts and subprocesses that choose, too
    else:  # equal bits have to be asked for there, and to compile each tiny run takes minutes
        TINY.extend(["--deterministic=true", "--compile=false"])
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before cuBLAS is there
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so to ask for a GPU spoils no fork
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device={device}: torch finds no GPU here")


def on_gpu() -> bool:
    """Whether this test's runs are on a GPU."""
    return "--device=cpu" not in TINY


@contextmanager
def on_cpu():
    """Within, it is as if there were no GPU, here and in processes that are begun here."""
    before = TINY[:]
    TINY[:] = ["--device=cpu" if word.startswith("--device=") else word for word in TINY]
    none = dict(is_available=lambda: False, is_initialized=lambda: False, device_count=lambda: 0)
    try:
        with (
            mock.patch.multiple("torch.cuda", **none),
            mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        ):
            yield
    finally:
        TINY[:] = before


def pytest_collection_modifyitems(items):
    """The longest come first: at the end a worker would wait a minute for another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What all modules hold need not be looked through again and again. And numba comes where a
    test asks for it, not after so many tokens of the others."""
    from engine import replay

    replay.WORTH_NUMBA = math.inf
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """With its fixtures, a test that is marked `cpu` runs there."""
    if not on_gpu():
        return (yield)
    import torch

    torch.cuda.init()  # the driver reads once which GPUs there are, and on_cpu() hides them
    torch.set_deterministic_debug_mode("default")  # as a new process has it
    if item.get_closest_marker("cpu"):
        with on_cpu():
            return (yield)
    return (yield)


def make_text(lines: int = 1500, seed: int = 0) -> str:
    """Sentences with some structure, accents, Chinese and emoji."""
    import random

    rng = random.Random(seed)
    subjects = ["the model", "a learner", "every token", "Zoë", "模型", "the loss", "nobody", "🙂"]
    verbs = ["reads", "predicts", "forgets", "learns", "学习", "reduces", "draws"]
    objects = ["the next word", "a long story", "gradients", "the corpus", "文字", "42 examples"]
    return "".join(
        f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)}.\n" for _ in range(lines)
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory, text_file) -> Path:
    """A data set of bytes: about 40,000 tokens to train on."""
    import prepare

    out = tmp_path_factory.mktemp("data") / "story"
    prepare.main([str(text_file), f"--out={out}", "--tokenizer=bytes"])
    return out


def write_shards(folder: Path, **splits) -> Path:
    """A folder of public shards, in the layout of llm.c: split name to token ids."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in splits.items():
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        content = header.tobytes() + np.array(tokens, "<u2").tobytes()
        (folder / f"toy_{split}_000000.bin").write_bytes(content)
    return folder


@pytest.fixture(scope="session", autouse=True)
def agreement():
    """Which fast parts agree with the book is found once for each shape, as long as no test has
    changed either: hundreds of runs ask."""
    import torch

    import canon
    import model
    from engine import agreement, fast, gradients

    agreeing, found = fast.agreeing, {}

    def asked(*shape, **training):
        if now() != before:
            return agreeing(*shape, **training)
        key = repr((shape, training)), torch.get_num_threads()
        if key not in found:
            found[key] = agreeing(*shape, **training)
        return [*found[key]]

    def now() -> list[dict]:
        places = [model, canon, fast, gradients, agreement]
        places += [cls for pair in fast.PARTS.values() for cls in pair]
        return [dict(vars(place)) for place in places]

    fast.agreeing = asked
    before = now()
    yield
    fast.agreeing = agreeing


@pytest.fixture(scope="session", autouse=True)
def flushes_in_name():
    """os.fsync asks whether the file is open, and waits for no disk: no test cuts the power, and
    those that count or break flushes do so before they come here. Processes of their own flush."""
    fsync = os.fsync
    os.fsync = lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None
    yield
    os.fsync = fsync


@pytest.fixture
def train(data, tmp_path):
    """train(name, *settings): trains a tiny model into tmp_path/name and returns the folder."""
    import train as script

    empty = tmp_path / "empty.py"
    empty.write_text("")

    def run(name: str, *settings: str, data=data, status: int = 0) -> Path:
        out = tmp_path / name
        argv = [str(empty), f"--data={data}", f"--out={out}", *TINY, *settings]
        assert script.main(argv) == status
        return out

    run.folder = tmp_path
    return run


@pytest.fixture
def threads_in_name(monkeypatch):
    """torch says that it has the threads that it is told to have, and goes on with one: more than
    one, beside another test, wait for each other longer than they work."""
    import torch

    told = [torch.get_num_threads()]
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
