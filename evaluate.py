"""How good is a model? python evaluate.py out/small --split=test

A model gives each next token a probability p, and its surprise is -ln p: 0 where it was certain and
right, ln 2 = 0.69 where it wavered between two, ln V where it knew nothing of V tokens. The mean is
the loss, in **nats** a token; divided by ln 2 = 0.693 it is in **bits**, answers to yes-or-no
questions. **Perplexity** is exp(loss): a loss of 3 is as unsure as a fair choice of exp(3) = 20.

Per token, two vocabularies cannot be compared: longer tokens are fewer, and each is harder. The
text has the same bytes in any of them, so **bits per byte** can: nats of all tokens / ln 2 / bytes.
To predict is to compress: an arithmetic coder stores the text in just so many bits (Shannon 1948).
Hence gzip and xz, which know nothing of language, stand beside the model as the mark to beat:
fewer bits are better. (The model's own size is not counted.)
"""

import gzip
import lzma
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dataset import IGNORE, Dataset, Split
from engine import settings
from engine.settings import Count

if TYPE_CHECKING:  # torch is imported where it is used, since mistakes are told before that
    from engine.machine import Machine
    from model import GPT
    from tokenizer import Tokenizer

EVAL_TOKENS = 16384  # in one forward pass
COMPARABLE_BYTES = 20_000_000  # xz takes too long for a larger text


@dataclass
class Settings:
    out: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    data: str = ""  # folder that prepare.py has written; by default that of the run
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    eval_tokens: Count = 0  # tokens of it to evaluate on, evenly spread; 0 is all
    device_batch: Count = 0  # most rows in one forward pass, which bounds memory; 0 is no bound
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the work
    fast: bool = True  # parts that compute the same as model.py sooner; false runs model.py itself
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly


def main(argv: list[str]) -> int:
    s = settings.load(Settings, argv, "Evaluate a model.", "out")
    return evaluate_run(s, s.checkpoint)


def evaluate_run(s, checkpoint: str = "best") -> int:
    """Prints the loss of the run `s.out` on `s.split` of `s.data`, and changes nothing."""
    from engine import fast, machine
    from engine.checkpoint import find, load_weights

    path = find(s.out, checkpoint)
    model, tokenizer, state = load_weights(path)
    trained_with = state["settings"]
    folder = s.data or trained_with.get("data")
    if not folder:
        raise ValueError(f"{path} was not trained here: name the data, --data=data/NAME")
    named = s.tokenizer if s.data else s.tokenizer or trained_with.get("tokenizer", "")
    data = Dataset(folder, named)
    data.require_tokenizer(tokenizer, s.out)
    split = data.split(s.split)
    here = machine.pick(s.device, s.dtype, "false")
    machine.start(here, s.deterministic)
    model.to(here.device)
    machine.use_threads(s.threads, here, model, EVAL_TOKENS)
    fast.use(model, here, s.fast)
    loss, bpb = evaluate(model, split, here, None, s.device_batch, s.eval_tokens)
    bits = f", {bpb:.4f} bits per byte" if bpb else ""
    here.say(f"{path} on the {s.split} split of {folder}: {loss:.4f} nats a token{bits}")
    return 0


def evaluate(
    model: "GPT",
    split: Split,
    here: "Machine",
    stop=None,
    device_batch: int = 0,
    eval_tokens: int = 0,
) -> tuple | None:
    """The loss: nats a token, and bits a byte of text where its size is known.

    Every token but the first is predicted once, in consecutive windows of the model's block_size,
    or in about `eval_tokens` / block_size of them, evenly spread. Each process takes its share, at
    most `device_batch` rows at a time. None if meanwhile a `stop` was asked of any process.
    """
    import torch

    rows = max(1, EVAL_TOKENS // model.config.block_size)
    rows = min(rows, device_batch or rows)
    nats, targets, size, asked = 0.0, 0, 0, False
    part_of_it = 0 < eval_tokens < split.tokens - 1
    was_training = model.training
    model.eval()  # no dropout
    with torch.no_grad(), here.autocast():
        for x, y, *_ in split.in_order(
            rows, model.config.block_size, here.rank, here.world, eval_tokens
        ):
            loss = model(here.put(x), here.put(y), reduction="sum").item()
            found = y[y != IGNORE]
            mine = split.bytes_of(found) if part_of_it and split.text_bytes else 0
            part = here.sum([loss, len(found), mine, bool(stop and stop.asked)])
            nats, targets, size = nats + part[0], targets + part[1], size + part[2]
            asked = part[3] > 0
            if asked:
                break
    model.train(was_training)
    if asked:
        return None
    size = size if part_of_it else split.text_bytes
    return nats / targets, nats / math.log(2) / size if size else None


def compressors(split: Split, tokenizer: "Tokenizer") -> str:
    """Bits per byte that gzip and xz need for the text of a split; empty if it is very large."""
    if (split.text_bytes or math.inf) > COMPARABLE_BYTES:
        return ""
    tokens = split.read(0, split.tokens)
    text = tokenizer.decode_bytes(tokens[tokens != tokenizer.end_of_text].tolist())
    if not text:
        return ""
    gz = len(gzip.compress(text, 9)) * 8 / len(text)
    xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(text)
    return f"gzip -9 {gz:.3f}, xz -9e {xz:.3f}"


if __name__ == "__main__":
    settings.run(main)
