"""Chapter 11: parts that must agree, batches without memory, files that are whole."""

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch

import model
from engine import checkpoint, fast
from lessons import ablations, require, specimen
from shape import GPTConfig

BOOK = "model"
CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=257, n_layer=1, n_embd=32)


def parts() -> list[str]:
    return fast.agreeing(CONFIG, CPU, torch.float32)


def obeyed() -> str:
    print("as it is         ", *parts())
    with mock.patch.object(model, "causal_mask", lambda T, S, device=None: torch.ones(T, S) > 0):
        changed = parts()
        print("without the mask ", *changed)
    return "a" if "attention" not in changed else "b"


def flipped() -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "specimen"
        shutil.copytree(specimen.FOLDER, copy)
        file = copy / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[100_000] ^= 1
        file.write_bytes(content)
        try:
            checkpoint.load_model(str(copy))
        except ValueError as e:
            print(str(e).replace(folder, ""))
            return "a"
    return "b"


def step_1000() -> int:
    """The batch of step 1000, asked for twice, and by four processes."""
    split = ablations.texts()
    one = split.batch(999, 32, 24, seed=1).tokens
    other = split.batch(999, 32, 24, seed=1).tokens
    shares = [split.batch(999, 32, 24, seed=1, rank=rank, world=4).tokens for rank in range(4)]
    print("first window:", repr(split.tokenizer.decode(one[0].tolist())))
    print("asked twice, tokens that differ:", int((one != other).sum()))
    off = sum(int((one[8 * i : 8 * i + 8] != share).sum()) for i, share in enumerate(shares))
    print("of four processes, eight windows each, tokens that differ:", off)
    return off


def small_numbers() -> float:
    """What 16 bits keep of a small change to a large number, and of a small number."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one = torch.tensor(1.0, dtype=dtype)
        eps = torch.finfo(dtype).eps
        tiny = torch.tensor(1e-8).to(dtype).item()
        said = f"1 + 0.001 = {(one + 0.001).item():.6f}   1e-8 is {tiny:.1e}   eps {eps:.1e}"
        print(f"{dtype!s:15} {said}")
    return (torch.tensor(1.0, dtype=torch.bfloat16) + 0.001).item()


QUESTIONS = (obeyed, flipped, step_1000, small_numbers)


# --- checks


def fast_parts_agree():
    """The fast forms compute what the reader's model.py computes, or are not used."""
    c = GPTConfig(vocab_size=257, n_layer=1, n_embd=32)
    net = model.GPT(c)
    net.init_weights(seed=1)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        wanted = net(tokens)
        fast.install(net, fast.agreeing(c, CPU, torch.float32))
        off = (net(tokens) - wanted).abs().max().item()
    require(off < 1e-4, f"with fast parts the logits are off by {off:.4f}")


def fast_norm(function):
    """Exercise 11.a: fast_norm(x, eps), in the one fused call that torch has for it."""
    for shape in ((3, 32), (2, 5, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        off = (function(x, 1e-6) - model.Norm(shape[-1], CONFIG)(x)).abs().max().item()
        require(off < 1e-5, f"for {shape} it is off by {off:.5f}")


def window_numbers(function):
    """Exercise 11.b: window_numbers(step, rows, rank, world): which windows of the endless sequence
    a process learns from in update `step`, counted from 1."""
    for values, wanted in (
        ((1000, 32, 1, 4), [*range(31_976, 31_984)]),
        ((1, 4, 0, 1), [0, 1, 2, 3]),
    ):
        found = list(function(*values))
        require(found == wanted, f"window_numbers{values} is {found}, and should be {wanted}")


CHECKS = (fast_parts_agree, fast_norm, window_numbers)
