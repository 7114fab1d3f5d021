"""What bench.py measures of ours: each stage, done for as long as it takes to tell how fast it is.

A function takes the settings `s` of bench.py and what its variant differs in, and gives a figure.
It raises ValueError for what is not to be had here. peers.py has what stands beside them.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import peers
from engine.arithmetic import products
from engine.measure import dimensions, figure, machine_for, timed
from shape import GPTConfig

ROOT = Path(__file__).parent
GPT2 = dict(position="learned", norm="layer", norm_weight=True, norm_eps=1e-5, embed_norm=False)
GPT2 |= dict(qk_norm=False, mlp="gelu", bias=True, tied=True, logit_cap=0)


def our_shape(s) -> GPTConfig:
    return GPTConfig(**dimensions(s), **(GPT2 if s.shape == "gpt2" else {}), zero_init=False)


def our_model(s):
    from model import GPT

    model = GPT(our_shape(s))
    model.init_weights(0)
    return model


def writer(s, here, model, rows: int = 1, quantize: str = "", several: bool = False):
    """A model of ours, made ready to write so many rows at once."""
    from engine import machine
    from engine.inference import ready

    model = model.eval().to(here.device, here.dtype)
    machine.use_threads("auto", here, model, rows)
    return ready(model, quantize, rows, s.fast, several)


# --- what the machine can do


def matrix_product(s, dtype: str) -> dict:
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


def memory_read(s) -> dict:
    import torch

    # 256 MB, beyond any cache
    x = torch.ones(1 << 25, dtype=torch.int64, device=machine_for("float32").device)
    return figure(x.nbytes / timed(s.calls, lambda: x.sum().item()) / 1e9, "GB/s")


# --- train


def train(
    s, dtype: str, peer: bool = False, of_rows: bool = False, compiled: bool | None = None
) -> dict:
    """Training steps, ours or of transformers: the model differs and nothing else.

    `of_rows`: windows are packed with rows of 32 tokens, which do not see each other. `compiled`:
    on a GPU, whether torch.compile makes the kernels; by default ours are, as in train.py.
    """
    import torch

    from dataset import layout
    from engine import fast, machine
    from tokenizer import Markers

    here = machine_for(dtype, gpu=compiled is not None)
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


def as_after_many_tokens() -> None:
    from engine import replay

    replay.WORTH_KERNELS = replay.WORTH_NUMBA = 0


def decode(s, dtype: str, samples: int = 1, context: int = 1, quantize: str = "") -> dict:
    import torch

    from generate import generate

    as_after_many_tokens()
    # one row at a time waits for memory and not for products, whatever their type
    here = machine_for(dtype, products=samples > 1)
    model = writer(s, here, our_model(s), samples, quantize)
    prompt = torch.randint(s.vocab_size, (context,)).tolist()
    steps = generate(model, prompt, 10**9, temperature=0, num_samples=samples)
    next(steps)  # the prompt is read
    count = max(1, s.tokens // 4)

    def some() -> None:
        for _ in range(count):
            next(steps)

    speed = samples * count / timed(s.calls, some)
    last = getattr(model, "last", None)  # what the text has, if it is one
    loops = last and type(last.states[-1].get("replay")).__name__ == "OneToken"
    how = [getattr(model, "form", ""), "numba" if loops else ""]
    return figure(speed, "tokens/s", ", ".join(filter(None, how)))


# --- speculate

FILES = ("textwrap", "heapq", "argparse", "shelve", "queue", "calendar")  # of the standard library


def one_pass(s, positions: int, quantize: str = "") -> dict:
    """So many tokens read in one pass behind 200 others, in the form that is chosen for several."""
    import torch

    from engine import machine, replay
    from speculate import read

    as_after_many_tokens()
    replay.PATIENCE = 0
    here = machine.pick(rows=1, size=our_shape(s).parameters())
    model = writer(s, here, our_model(s), quantize=quantize, several=True)
    cache, tokens = model.new_cache(size=256), torch.randint(s.vocab_size, (200,)).tolist()
    read(model, tokens, cache)

    def again() -> None:
        cache.lengths.fill_(200)
        read(model, tokens[:positions], cache)

    return figure(1e3 * timed(s.calls, again), "ms")


def write(s, temperature: float, guess: bool, quantize: str = "") -> dict:
    """A model that has learned goes on behind the first half of each of FILES."""
    import importlib

    import speculate
    from engine import machine
    from engine.checkpoint import load_model
    from engine.wider import wider
    from generate import generate

    as_after_many_tokens()
    model, tokenizer = load_model(s.run)
    unused = [*tokenizer.unused, *range(model.config.vocab_size, s.vocab_size)]
    here = machine.pick(rows=1, size=our_shape(s).parameters())
    model = wider(model, s.n_layer, s.n_embd, s.vocab_size)
    model = writer(s, here, model, quantize=quantize, several=guess)
    passes, read, seconds = [], speculate.read, []
    speculate.read = lambda model, tokens, cache: (
        passes.append(len(tokens)) or read(model, tokens, cache)
    )
    for name in (FILES[0], *FILES):  # the first for nothing: once a process, loops are loaded
        text = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
        prompt = tokenizer.encode(text[: len(text) // 2])
        how = speculate.speculate if guess else generate
        steps = how(model, prompt, 1 + s.tokens, unused=unused, temperature=temperature, seed=1)
        next(steps)  # the prompt is read
        start = time.perf_counter()
        list(steps)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            passes.clear()
    tokens, guesses = s.tokens * len(FILES), sum(passes) - len(passes)
    more = f"{tokens / len(passes):.2f} tokens a pass, of {guesses} guesses " if passes else ""
    more += f"{(tokens - len(passes)) / max(1, guesses):.0%} accepted" if passes else ""
    return figure(tokens / sum(seconds[1:]), "tokens/s", more)


# --- answers: four layers of width 128, with the markers of rows

SMALL = dict(shape="modern", n_layer=4, n_head=4, n_embd=128, vocab_size=2053, block_size=256)
SMALL |= dict(rows=6, length=256)
MOST = 64  # tokens of an answer
ONE_IN = 24  # tokens that end an answer: one in so many, so that lengths differ


def learn(s, of_rows: bool) -> dict:
    return train(replace(s, **SMALL), "auto", of_rows=of_rows)


def answer(s, slots: int) -> dict:
    """Sampled answers to prompts of 8 to 40 tokens: `slots` at once, or one by one."""
    from engine import machine
    from generate import answers, generate

    s = replace(s, **SMALL)
    model = writer(s, machine.pick(), our_model(s), slots)
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

SLOTS = 8  # for as many clients
PROMPT = 32  # tokens


def serve(s, clients: int, shape: dict | None = None, dtype: str = "auto") -> dict:
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
    options = script.Settings("model", port=0, slots=SLOTS, dtype=dtype, fast=s.fast)
    server, listener = Server(options, our_model(s), tokenizer, ROOT), script.bound(options)
    threading.Thread(target=server.serve, args=[listener]).start()
    where, found = listener.getsockname(), {}

    def ask() -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # no lock in common with it
            pool.apply(load.run, (*where, clients, clients, PROMPT, 4))  # a warm-up
            all_of_them = (*where, clients, s.calls * clients, PROMPT, s.tokens)
            found.update(pool.apply(load.run, all_of_them))
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


def prepared(name: str, lines: Iterable[str], *argv: str) -> tuple[int, float]:
    """Our whole prepare.py on a file of these lines, reading, cleaning and writing included: how
    many tokens it makes, in how many seconds."""
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "out"
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines)
        command = [sys.executable, str(ROOT / "prepare.py"), str(path), f"--out={out}", *argv]
        start = time.perf_counter()
        # standard output is for figures: what it prints goes to standard error
        subprocess.run(command, check=True, stdout=2)
        seconds = time.perf_counter() - start
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return sum(split["tokens"] for split in meta["splits"].values()), seconds


def encode(s) -> dict:
    tokens, seconds = prepared("text.txt", [library_text()], f"--tokenizer={s.tokenizer}")
    return figure(tokens / seconds / 1e6, "M tokens/s", "whole command")


def encode_tiktoken(s) -> dict:
    text = library_text()
    start = time.perf_counter()
    tokens = peers.tiktoken_encode(text, s.tokenizer)
    return figure(tokens / (time.perf_counter() - start) / 1e6, "M tokens/s", "encoding only")


def grow(s, documents: int, argv: str = "") -> dict:
    """The same on documents of 16 random words, one in five like an earlier one; one worker."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=2 + i % 8)) for i in range(5000)]

    def lines() -> Iterator[str]:
        for i in range(documents):
            seed = rng.randrange(i + 1) if i % 5 == 4 else i
            text = " ".join(random.Random(seed).choices(words, k=16))
            yield json.dumps({"text": text}) + "\n"

    argv = ["--tokenizer=bytes", "--workers=1", *argv.split()]
    _, seconds = prepared("text.jsonl", lines(), *argv)
    return figure(documents / seconds, "documents/s", f"{seconds:.0f} s", of_children=True)
