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
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Literal

import peers
from engine import settings
from engine.arithmetic import products
from engine.measure import figure, in_turn, print_table, timed
from engine.settings import Positive
from shape import GPTConfig

ROOT = Path(__file__).parent
GPT2 = dict(position="learned", norm="layer", norm_weight=True, norm_eps=1e-5, embed_norm=False)
GPT2 |= dict(qk_norm=False, mlp="gelu", bias=True, tied=True, logit_cap=0)


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
    answers: Positive = 1000  # answers: how many; the shape is that of config/small.py
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


def machine_for(dtype: str, products: bool = True):
    """The machine with that number type. ValueError if it would emulate its matrix products."""
    from engine import machine

    fast = machine.pick()
    here = machine.pick(dtype=dtype)
    if products and dtype == "bfloat16" and here.dtype != fast.dtype:
        raise ValueError(f"no fast bfloat16 here, and emulating it takes minutes: {fast.why}")
    return here


def require_gpu(here) -> None:
    """Raises ValueError elsewhere, where compiled kernels do not pay: docs/speed.md."""
    if here.device.type != "cuda":
        raise ValueError("compiled and not compiled are compared on a GPU")


def dimensions(s: Settings) -> dict:
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    return {name: getattr(s, name) for name in names}


def our_shape(s: Settings) -> GPTConfig:
    return GPTConfig(**dimensions(s), **(GPT2 if s.shape == "gpt2" else {}), zero_init=False)


def our_model(s: Settings):
    from model import GPT

    model = GPT(our_shape(s))
    model.init_weights(0)
    return model


# --- what the machine can do


def matrix_product(s: Settings, dtype: str) -> dict:
    import torch

    here = machine_for(dtype)
    # a GPU needs large ones, and several behind one another, or it waits for its orders
    n, count = (8192, 20) if here.device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=here.device, dtype=here.dtype) for _ in range(2))

    def some() -> float:
        for _ in range(count):
            c = a @ b
        return c[0, 0].item()

    return figure(2 * n**3 * count / timed(s.calls, some) / 1e9, "GFLOP/s")


def memory_read(s: Settings) -> dict:
    import torch

    # 256 MB, beyond any cache
    x = torch.ones(1 << 25, dtype=torch.int64, device=machine_for("float32").device)
    return figure(x.nbytes / timed(s.calls, lambda: x.sum().item()) / 1e9, "GB/s")


# --- train


def train(
    s: Settings, dtype: str, peer: bool = False, of_rows: bool = False, compiled: bool | None = None
) -> dict:
    """Training steps, ours or of transformers: the model differs and nothing else.

    `of_rows`: windows are packed with rows of 32 tokens, which do not see each other. `compiled`:
    on a GPU, whether torch.compile makes the kernels; by default ours are, as in train.py.
    """
    import torch

    from dataset import layout
    from engine import fast, machine
    from tokenizer import Markers

    here = machine_for(dtype)
    if compiled is not None:
        require_gpu(here)
    machine.start(here, deterministic=False)
    model = peers.transformers_gpt2(**dimensions(s)) if peer else our_model(s)
    model = model.train().to(here.device)
    machine.use_threads("auto", here, model, s.rows * s.length)
    if not peer:
        fast.use(model, here, s.fast)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    gradients = machine.GradientSum(parameters if here.world > 1 else [])
    gradients.active = True
    x = torch.randint(s.vocab_size, (s.rows, s.length + 1), device=here.device)
    mean_loss = partial(peers.transformers_loss, model) if peer else model
    if (here.compile and not peer) if compiled is None else compiled:
        mean_loss = torch.compile(mean_loss)
    markers = Markers(*range(s.vocab_size - 5, s.vocab_size))
    if of_rows:
        x[:, ::32] = markers.end_of_text

    def step() -> None:
        tokens, targets, seen = x[:, :-1], x[:, 1:].contiguous(), {}
        if of_rows:
            where, mask = map(here.put, layout(tokens.cpu().numpy(), markers, "causal"))
            seen = dict(positions=where, mask=mask)
        with here.autocast():
            loss = mean_loss(tokens, targets, **seen) / here.world
        loss.backward()
        gradients.wait()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    speed = s.rows * s.length * here.world / timed(s.calls, step)
    flops = products(our_shape(s), s.length) * speed
    return figure(speed, "tokens/s", f"{flops / 1e9:,.0f} GFLOP/s")


# --- decode


def decode(s: Settings, dtype: str, samples: int = 1, context: int = 1, quantize: str = "") -> dict:
    import torch

    from engine import machine
    from engine.inference import ready
    from generate import generate

    # one row at a time waits for memory and not for products, whatever their type
    here = machine_for(dtype, products=samples > 1)
    model = our_model(s).eval().to(here.device, here.dtype)
    machine.use_threads("auto", here, model, samples)
    model = ready(model, quantize, samples, parts=s.fast)
    prompt = torch.randint(s.vocab_size, (context,)).tolist()
    steps = generate(model, prompt, 10**9, temperature=0, num_samples=samples)
    next(steps)  # the prompt is read
    count = max(1, s.tokens // 4)

    def some() -> None:
        for _ in range(count):
            next(steps)

    return figure(samples * count / timed(s.calls, some), "tokens/s")


def decode_transformers(s: Settings, dtype: str, compiled: bool = False) -> dict:
    here = machine_for(dtype)
    if compiled:
        require_gpu(here)
    run = peers.transformers_decoder(dimensions(s), s.tokens, here, compiled)
    return figure(s.tokens / timed(s.calls, run), "tokens/s")


def decode_ctranslate2(s: Settings, dtype: str, samples: int = 1) -> dict:
    run = peers.ctranslate2_decoder(dimensions(s), s.tokens, dtype, samples)
    return figure(samples * s.tokens / timed(s.calls, run), "tokens/s")


# --- speculate

FILES = ("textwrap", "heapq", "argparse", "shelve", "queue", "calendar")  # of the standard library


def one_pass(s: Settings, positions: int) -> dict:
    """So many tokens read in one pass behind 200 others, in the form that is chosen for several."""
    import torch

    from engine import machine
    from engine.inference import ready
    from speculate import read

    here = machine.pick(rows=1, size=our_shape(s).parameters())
    model = our_model(s).eval().to(here.device, here.dtype)
    machine.use_threads("auto", here, model, 1)
    model = ready(model, parts=s.fast, several=True)
    cache, tokens = model.new_cache(size=256), torch.randint(s.vocab_size, (200,)).tolist()
    read(model, tokens, cache)

    def again() -> None:
        cache.lengths.fill_(200)
        read(model, tokens[:positions], cache)

    return figure(1e3 * timed(s.calls, again), "ms")


def write(s: Settings, temperature: float, guess: bool) -> dict:
    """A model that has learned goes on behind the first half of each of FILES."""
    import importlib

    import speculate
    from engine import machine
    from engine.checkpoint import load_model
    from engine.inference import ready
    from engine.wider import wider
    from generate import generate

    model, tokenizer = load_model(s.run)
    unused = [*tokenizer.unused, *range(model.config.vocab_size, s.vocab_size)]
    here = machine.pick(rows=1, size=our_shape(s).parameters())
    model = wider(model, s.n_layer, s.n_embd, s.vocab_size).to(here.device, here.dtype)
    machine.use_threads("auto", here, model, 1)
    model = ready(model, parts=s.fast, several=guess)
    passes, read, seconds = [], speculate.read, 0.0
    speculate.read = lambda model, tokens, cache: (
        passes.append(len(tokens)) or read(model, tokens, cache)
    )
    for name in FILES:
        text = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
        prompt = tokenizer.encode(text[: len(text) // 2])
        how = speculate.speculate if guess else generate
        steps = how(model, prompt, 1 + s.tokens, unused=unused, temperature=temperature, seed=1)
        next(steps)  # the prompt is read
        start = time.perf_counter()
        list(steps)
        seconds += time.perf_counter() - start
    tokens, guesses = s.tokens * len(FILES), sum(passes) - len(passes)
    more = f"{tokens / len(passes):.2f} tokens a pass, of {guesses} guesses " if passes else ""
    more += f"{(tokens - len(passes)) / max(1, guesses):.0%} accepted" if passes else ""
    return figure(tokens / seconds, "tokens/s", more)


# --- answers: the model of config/small.py, with the markers of rows

SMALL = dict(shape="modern", n_layer=4, n_head=4, n_embd=128, vocab_size=2053, block_size=256)
SMALL |= dict(rows=6, length=256)
MOST = 64  # tokens of an answer
ONE_IN = 24  # tokens that end an answer: one in so many, so that lengths differ


def learn(s: Settings, of_rows: bool) -> dict:
    return train(replace(s, **SMALL), "auto", of_rows=of_rows)


def answer(s: Settings, slots: int) -> dict:
    """Sampled answers to prompts of 8 to 40 tokens: `slots` at once, or one by one."""
    from engine import machine
    from engine.inference import ready
    from generate import answers, generate

    s = replace(s, **SMALL)
    here = machine.pick()
    model = our_model(s).eval().to(here.device, here.dtype)
    machine.use_threads("auto", here, model, slots)
    model = ready(model, rows=slots, parts=s.fast)
    words = SimpleNamespace(unused=[], markers=None, ends=range(0, s.vocab_size, ONE_IN))
    rng = random.Random(0)
    lengths = [rng.randint(8, 40) for _ in range(s.answers)]
    prompts = [rng.choices(range(s.vocab_size), k=length) for length in lengths]

    def write(prompts: list[list[int]]) -> None:
        if slots > 1:
            list(answers(model, words, prompts, MOST, slots=slots))
        for prompt in prompts if slots == 1 else ():
            for (token,) in generate(model, prompt, MOST):
                if token in words.ends:
                    break

    write(prompts[: 2 * slots])  # a warm-up
    start = time.perf_counter()
    write(prompts)
    return figure(s.answers / (time.perf_counter() - start), "answers/s")


# --- serve

CLIENTS = 8
PROMPT = 32  # tokens


def serve(s: Settings, clients: int, shape: dict | None = None, dtype: str = "auto") -> dict:
    """`clients` that ask one request after another of serve.py: tokens in a second, and how long
    they wait for the first and between two."""
    import multiprocessing
    import threading

    import serve as script
    from engine import load
    from engine.server import Server
    from tokenizer import bytes_tokenizer

    s = replace(s, **(shape or {}))
    tokenizer = bytes_tokenizer()
    tokenizer.vocab_size = s.vocab_size  # what the ids mean does not matter
    tokenizer.decode_bytes = lambda ids: b"".join(b"%d " % i for i in ids)
    options = script.Settings("model", port=0, slots=CLIENTS, dtype=dtype, fast=s.fast)
    server, listener = Server(options, our_model(s), tokenizer, ROOT), script.bound(options)
    threading.Thread(target=server.serve, args=[listener]).start()
    where, found = listener.getsockname(), {}

    def ask() -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # no lock in common with it
            pool.apply(load.run, (*where, clients, clients, PROMPT, 4))  # a warm-up
            found.update(
                pool.apply(load.run, (*where, clients, s.calls * clients, PROMPT, s.tokens))
            )
        server.end()

    threading.Thread(target=ask).start()
    server.engine.run()
    return figure(found["speed"], "tokens/s", load.words(found))


# --- prepare


def library_text() -> str:
    """About 64 MB: the standard library, several times over."""
    from engine.sources import documents

    text = "".join("".join(pieces) for pieces in documents("python"))
    return text * (64_000_000 // len(text) + 1)


def encode(s: Settings) -> dict:
    """Our whole prepare.py on a file of that text: reading, cleaning and writing included."""
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / "text.txt", Path(folder) / "out"
        path.write_text(library_text(), encoding="utf-8")
        command = [sys.executable, str(ROOT / "prepare.py"), str(path), f"--out={out}"]
        start = time.perf_counter()
        # standard output is for figures: what it prints goes to standard error
        subprocess.run([*command, f"--tokenizer={s.tokenizer}"], check=True, stdout=2)
        seconds = time.perf_counter() - start
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    return figure(tokens / seconds / 1e6, "M tokens/s", "whole command")


def encode_tiktoken(s: Settings) -> dict:
    text = library_text()
    start = time.perf_counter()
    tokens = peers.tiktoken_encode(text, s.tokenizer)
    return figure(tokens / (time.perf_counter() - start) / 1e6, "M tokens/s", "encoding only")


def grow(s: Settings, documents: int, *argv: str) -> dict:
    """The same on documents of 16 random words, one in five like an earlier one; one worker."""
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / "text.jsonl", Path(folder) / "out"
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlu", k=2 + i % 8)) for i in range(5000)]
        with open(path, "w") as f:
            for i in range(documents):
                seed = rng.randrange(i + 1) if i % 5 == 4 else i
                text = " ".join(random.Random(seed).choices(words, k=16))
                print(json.dumps({"text": text}), file=f)
        command = [sys.executable, str(ROOT / "prepare.py"), str(path), f"--out={out}"]
        command += ["--tokenizer=bytes", "--workers=1", *argv]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=2)
        seconds = time.perf_counter() - start
    return figure(documents / seconds, "documents/s", f"{seconds:.0f} s", of_children=True)


# --- all of them


def in_both(name: str, function, more: str = "", **options) -> dict:
    """The variants of `function` in both number types."""
    kinds = ("bfloat16", "float32")
    return {f"{name}, {kind}{more}": partial(function, dtype=kind, **options) for kind in kinds}


LIMITS = in_both("matrix product", matrix_product) | {"memory read": memory_read}
VARIANTS = {
    "train": LIMITS
    | in_both("ours", train)
    | in_both("transformers", train, peer=True)
    | {"ours, bfloat16, not compiled": partial(train, dtype="bfloat16", compiled=False)}
    | {
        "transformers, bfloat16, compiled": partial(
            train, dtype="bfloat16", peer=True, compiled=True
        )
    },
    "decode": LIMITS
    | in_both("ours", decode)
    | {"ours, int8": partial(decode, dtype="bfloat16", quantize="int8")}
    | in_both("ours", decode, ", eight sequences", samples=8)
    | {"ours, bfloat16, behind 900 tokens": partial(decode, dtype="bfloat16", context=900)}
    | in_both("transformers", decode_transformers)
    | {
        "transformers, bfloat16, compiled": partial(
            decode_transformers, dtype="bfloat16", compiled=True
        )
    }
    | {"CTranslate2, float32": partial(decode_ctranslate2, dtype="float32")}
    | {"CTranslate2, int8": partial(decode_ctranslate2, dtype="int8")},
    "speculate": {f"a pass of {n}": partial(one_pass, positions=n) for n in (1, 2, 4, 8, 16)}
    | {"greedy": partial(write, temperature=0, guess=False)}
    | {"greedy, lookup": partial(write, temperature=0, guess=True)}
    | {"temperature 0.7": partial(write, temperature=0.7, guess=False)}
    | {"temperature 0.7, lookup": partial(write, temperature=0.7, guess=True)},
    "answers": {
        "one by one": partial(answer, slots=1),
        "32 at once": partial(answer, slots=32),
        "training, running text": partial(learn, of_rows=False),
        "training, rows": partial(learn, of_rows=True),
    },
    "serve": {
        "one client": partial(serve, clients=1),
        "eight clients": partial(serve, clients=CLIENTS),
        "transformers, one by one": partial(decode_transformers, dtype="float32"),
        "CTranslate2, one by one": partial(decode_ctranslate2, dtype="float32"),
        "CTranslate2, a batch of eight": partial(
            decode_ctranslate2, dtype="float32", samples=CLIENTS
        ),
        "small, one client": partial(serve, clients=1, shape=SMALL),
        "small, eight clients": partial(serve, clients=CLIENTS, shape=SMALL),
    },
    "prepare": {"ours": encode, "tiktoken": encode_tiktoken},
    "growth": {f"{n:,} documents": partial(grow, documents=n) for n in (20_000, 200_000, 2_000_000)}
    | {
        f"200,000 documents, {argv}": lambda s, argv=argv: grow(s, 200_000, argv)
        for argv in ("--part=1/16", "--near=0.8")
    },
}


if __name__ == "__main__":
    settings.run(main)
