"""How fast each stage is, beside this machine's own limits and a peer: python bench.py train

    train     training steps of GPT-2's smallest shape, beside transformers (if installed)
    decode    text from that shape, one sequence and eight, beside transformers and CTranslate2
    speculate text of that shape from a trained run (--run), with guesses from the text and without
    answers   1,000 answers at once and one by one, and training on rows and on running text
    serve     serve.py with eight clients at once and one, their waiting, beside the same peers
    prepare   the whole of prepare.py with GPT-2's vocabulary, beside tiktoken's own batch call
    growth    prepare.py on short documents, ten and a hundred times as many: time and memory

Every figure comes from a process of its own. The variants take turns for `rounds` rounds, and the
table shows medians, so that a machine that is slower for a while is slower for all. Whatever is not
to be had here (a library, a number type that the hardware would emulate) is left out, and said.
`torchrun --nproc_per_node=2 bench.py train --only="ours, float32"` measures two processes as one.
"""

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import peers
import stages
from engine import settings
from engine.measure import in_turn, print_table
from engine.settings import Positive


@dataclass
class Settings:
    what: str = "train"  # train, decode, speculate, answers, serve, prepare or growth
    rounds: Positive = 3  # times that each variant runs, in a process of its own
    calls: Positive = 6  # in each of them, what is measured is done so often
    shape: Literal["gpt2", "modern"] = "gpt2"  # train, decode: ours; modern is train.py's default
    n_layer: Positive = 12  # of that shape
    n_head: Positive = 12  # of that shape
    n_embd: Positive = 768  # of that shape
    vocab_size: Positive = 50257  # of that shape
    block_size: Positive = 1024  # of that shape
    rows: Positive = 4  # train: sequences in a step
    length: Positive = 256  # train: tokens of a sequence
    fast: bool = True  # train, decode: false measures model.py itself
    tokens: Positive = 64  # decode, serve: tokens to generate
    run: str = "out/small"  # speculate: a run of the default shape, made as large as that shape
    answers: Positive = 1000  # answers: how many, by four layers of width 128
    tokenizer: str = "gpt2"  # prepare: the vocabulary
    only: str = ""  # run this variant alone, in this process, and print its figures as JSON


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Measure speed.", "what")
    settings.require(s.what in VARIANTS, s, "what", f"one of {', '.join(VARIANTS)}")
    variants = VARIANTS[s.what]
    settings.require(not s.only or s.only in variants, s, "only", "one of its variants")
    if s.only:
        result = variants[s.only](s)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result))
        return
    print_table(in_turn(list(variants), s.rounds, [sys.executable, __file__, *argv]))


def in_both(name: str, function, more: str = "", **options) -> dict:
    """The variants of `function` in both number types."""
    kinds = ("bfloat16", "float32")
    return {f"{name}, {kind}{more}": partial(function, dtype=kind, **options) for kind in kinds}


LIMITS = in_both("matrix product", stages.matrix_product) | {"memory read": stages.memory_read}
COMPILED = dict(dtype="bfloat16", compiled=True)
SPECULATE = {f"a pass of {n}": (stages.one_pass, dict(positions=n)) for n in (1, 2, 4, 8, 16)}
SPECULATE |= {
    f"{how}{more}": (stages.write, dict(temperature=temperature, guess=guess))
    for how, temperature in (("greedy", 0), ("temperature 0.7", 0.7))
    for more, guess in (("", False), (", lookup", True))
}
VARIANTS = {
    "train": LIMITS
    | in_both("ours", stages.train)
    | in_both("transformers", stages.train, peer=True)
    | {"ours, bfloat16, not compiled": partial(stages.train, dtype="bfloat16", compiled=False)}
    | {"transformers, bfloat16, compiled": partial(stages.train, peer=True, **COMPILED)},
    "decode": LIMITS
    | in_both("ours", stages.decode)
    | {"ours, int8": partial(stages.decode, dtype="bfloat16", quantize="int8")}
    | in_both("ours", stages.decode, ", eight sequences", samples=8)
    | {"ours, bfloat16, behind 900 tokens": partial(stages.decode, dtype="bfloat16", context=900)}
    | in_both("transformers", peers.transformers)
    | {"transformers, bfloat16, compiled": partial(peers.transformers, **COMPILED)}
    | {"CTranslate2, float32": partial(peers.ctranslate2, dtype="float32")}
    | {"CTranslate2, int8": partial(peers.ctranslate2, dtype="int8")},
    "speculate": {
        f"{name}{more}": partial(function, **options, quantize=quantize)
        for more, quantize in (("", ""), (", int8", "int8"))
        for name, (function, options) in SPECULATE.items()
    },
    "answers": {
        "one by one": partial(stages.answer, slots=1),
        "32 at once": partial(stages.answer, slots=32),
        "training, running text": partial(stages.learn, of_rows=False),
        "training, rows": partial(stages.learn, of_rows=True),
    },
    "serve": {
        "one client": partial(stages.serve, clients=1),
        "eight clients": partial(stages.serve, clients=8),
        "transformers, one by one": partial(peers.transformers, dtype="float32"),
        "CTranslate2, one by one": partial(peers.ctranslate2, dtype="float32"),
        "CTranslate2, a batch of eight": partial(peers.ctranslate2, dtype="float32", samples=8),
        "small, one client": partial(stages.serve, clients=1, shape=stages.SMALL),
        "small, eight clients": partial(stages.serve, clients=8, shape=stages.SMALL),
    },
    "prepare": {"ours": stages.encode, "tiktoken": stages.encode_tiktoken},
    "growth": {
        f"{n:,} documents": partial(stages.grow, documents=n) for n in (20_000, 200_000, 2_000_000)
    }
    | {
        f"200,000 documents, {argv}": partial(stages.grow, documents=200_000, argv=argv)
        for argv in ("--part=1/16", "--near=0.8")
    },
}


if __name__ == "__main__":
    settings.run(main)
