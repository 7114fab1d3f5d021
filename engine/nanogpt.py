"""A checkpoint of nanoGPT, its ckpt.pt, read without running what may stand in it.

A pickle is a program that builds objects. torch lets this one build tensors, numbers, strings, and
lists and dicts of them (`weights_only`); a file that asks for anything else is not opened.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from engine.checkpoint import saved_shape
from engine.families import GPT2, Family
from shape import GPTConfig
from tokenizer import Tokenizer, find_tokenizer

# GPT-2's names and parts, but nn.Linear's matrices
NANOGPT = replace(GPT2, architecture="nanoGPT", described="model_args")
NEEDED = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
PLAIN = (bool, int, float, str, type(None))  # and not lists of lists, which may be as large as any
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PADDING = 128  # it pads a vocabulary to a multiple of 64, others to one of this


class Mapped(NamedTuple):
    """A tensor of the file, which stays there until it is read: like `engine.tensors.Stored`."""

    shape: list[int]
    kind: str
    read: Callable[[], Tensor]


def read(source: str, name: str) -> tuple[Family, GPTConfig, dict[str, Mapped], Tokenizer]:
    """Family, shape and tensors of the file `source`, without rows that only pad its vocabulary,
    which is `name`: the file does not say. Raises ValueError for any other file."""
    # 1. the shape: model_args are called as our settings are
    content = load(source)
    args, weights = (content.get(key) for key in ("model_args", "model"))
    both = isinstance(weights, dict) and isinstance(args, dict) and args.keys() >= NEEDED
    if not (both and all(isinstance(value, PLAIN) for value in args.values())):
        raise ValueError(
            f"{source} is no checkpoint of nanoGPT: that has model, a dict of tensors, and"
            f" model_args, a dict of numbers with {', '.join(sorted(NEEDED))}"
        )
    try:
        c = saved_shape(GPT2.shape | dict(norm_eps=1e-5, tied=True) | args)
    except (ValueError, TypeError) as e:
        raise ValueError(f"model_args of {source}: {e}") from e

    # 2. the vocabulary
    tokenizer = find_tokenizer(name)
    rows, size = c.vocab_size, tokenizer.vocab_size
    if not 0 <= rows - size < PADDING:
        raise ValueError(
            f"{source} has {rows:,} tokens, and {name} {size:,}: name its own --tokenizer; if they"
            " are characters (there is a meta.pkl), which no tokenizer here has, train anew on its"
            " text with --tokenizer=bytes"
        )
    if rows > size:
        print(f"{rows - size} rows of the vocabulary, which only pad it to {rows:,}, are left out")

    # 3. the tensors
    found, table, head, size_of_all = {}, "transformer.wte.weight", "lm_head.weight", 0
    for key, w in weights.items():
        key = str(key).removeprefix("_orig_mod.")  # of a compiled model
        if not (key.isprintable() and len(key) < 80 and key not in found and is_whole(w)):
            raise ValueError(f"{source} is damaged: {key!r:.80} of its model is no whole tensor")
        w = torch.detach(w)  # without the attributes that a pickle may give it
        size_of_all += w.nbytes if key != head else 0  # which may be the embedding
        if key in (table, head) and w.shape[:1] == (rows,):
            w = w[:size]
        found[key] = Mapped([*w.shape], KINDS.get(w.dtype, str(w.dtype)), w.detach)
    if size_of_all > Path(source).stat().st_size:
        raise ValueError(f"{source} is damaged: the tensors of its model have numbers in common")
    one, two = found.get(table), found.get(head)
    tied = not (one and two) or (one[:2] == two[:2] and torch.equal(one.read(), two.read()))
    return NANOGPT, replace(c, vocab_size=size, tied=tied), found, tokenizer


def is_whole(w) -> bool:
    """Whether `w` is a tensor of which each number stands in the file."""
    usual = isinstance(w, Tensor) and w.layout == torch.strided and w.device.type == "cpu"
    usual = usual and not (w.is_nested or w.is_quantized or torch.is_neg(w))
    return usual and Tensor.is_contiguous(w)


def load(source: str) -> dict:
    """The dict in the file, of tensors and plain values. Raises ValueError if more is in it."""
    try:
        with ZipFile(source) as parts:  # torch.save compresses none: a small file stays small
            if any(part.compress_type != ZIP_STORED for part in parts.infolist()):
                raise ValueError("it is compressed")
        objects = get_unsafe_globals_in_checkpoint(source)  # it looks, and builds nothing
        content = {} if objects else torch.load(source, "cpu", weights_only=True, mmap=True)
    except Exception as e:  # there are many, some of which advise to run what is in it
        raise ValueError(
            f"{source} is damaged, or no file that torch.save has written ({type(e).__name__}): of"
            " a model in other files name the folder"
        ) from e
    if objects:
        raise ValueError(
            f"{source} has more in it than tensors and plain values ({sorted(objects)[0]!r:.80}),"
            " and could run any program, so it is not opened: where you trust it, save its model"
            " and model_args alone with torch.save"
        )
    return content if isinstance(content, dict) else {}
