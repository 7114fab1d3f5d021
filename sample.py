"""Text from a checkpoint: python sample.py out/small --prompt="def " --num_samples=3

`generate` yields tokens one by one, with a KV cache; `TextStream` turns them into text that never
ends inside a character; the rest is the command line.
"""

import codecs
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine import settings, threads


@dataclass
class Settings:
    run: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or step-...
    prompt: str = ""  # text to continue; empty begins a new document
    prompt_file: str = ""  # read the prompt from this file; - is standard input
    max_tokens: int = 200  # tokens to generate for each sample
    temperature: float = 0.8  # 0 takes the likeliest token, 1 samples from the model as it is
    top_k: int = 0  # choose among the k likeliest tokens; 0 is all
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability
    num_samples: int = 1  # continuations of the same prompt
    stop: tuple = ()  # end a sample before this text; may be given several times
    seed: int = 1  # same seed, same text
    interactive: bool = False  # ask for one prompt after another
    quantize: str = ""  # int8: weights of eight bits, on a CPU; faster, with a slightly higher loss
    device: str = "auto"  # cpu, cuda or mps
    dtype: str = "auto"  # float32, bfloat16 or float16
    threads: str = "auto"  # of a CPU: a number, or chosen by the size of the model


def generate(
    model,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
) -> Iterator[list[int]]:
    """Yields `max_tokens` lists of the next token of each of `num_samples` continuations.

    The prompt is read once for all samples. It must have a token; only its last `block_size` count.
    When the context is full, its last half is read anew. Sample i depends on (seed, i) alone.
    """
    import torch

    from engine import inference
    from model import KVCache

    limit, like = model.config.block_size, next(model.parameters())
    draws = [random.Random(f"{seed} {i}") for i in range(num_samples)]
    context = torch.tensor([prompt[-limit:]], device=like.device)  # (1, T), later (B, T)
    # on a CPU attention in float32 is several times faster, and its part of memory traffic small
    dtype = torch.float32 if like.device.type == "cpu" else like.dtype
    room = min(limit, context.size(1) + max_tokens)
    cache, new, recorded = KVCache(model.config, 1, like.device, dtype, room), context, None
    for _ in range(max_tokens):
        if cache.length + new.size(1) > limit:
            cache.length, context = 0, context[:, -max(1, limit // 2) :]
            new = context
        with torch.inference_mode():
            if inference.records(like.device) and new.size(1) == 1 and len(new) == num_samples:
                recorded = recorded or inference.RecordedStep(model, cache)
                logits = recorded(new)
            else:
                logits = model(new, cache=cache)[:, -1]  # (1, V), later (B, V)
        if len(context) < num_samples:  # the prompt is in the cache: from here on, one row a sample
            cache.expand(num_samples)
            context, logits = context.expand(num_samples, -1), logits.expand(num_samples, -1)
        uniform = [draw.random() for draw in draws]
        new = pick(logits, temperature, top_k, top_p, uniform)[:, None]  # (B, 1)
        context = torch.cat((context, new), dim=1)
        yield new[:, 0].tolist()


def pick(logits, temperature: float, top_k: int, top_p: float, uniform: list[float]):
    """One token for each row of logits (B, V), by inverting the cumulative distribution: (B,).

    `uniform` holds a number in [0, 1) for each row, so that the random source is not the device's.
    Top-p is nucleus sampling, arXiv:1904.09751.
    """
    import torch

    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.double(), None
    if 0 < top_k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    # the maximum goes before the division, which may be by almost nothing
    p = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    before = p.cumsum(dim=-1) - p  # probability of all likelier tokens
    p = p.masked_fill(before >= top_p, 0.0)
    cumulative = p.cumsum(dim=-1)
    u = torch.tensor(uniform, dtype=p.dtype, device=p.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, u, right=True).clamp(max=p.size(-1) - 1)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


class TextStream:
    """Tokens in, text out, as soon as it is certain.

    Held back are the bytes of an unfinished character, and whatever may be the beginning of one of
    the `stop` strings. `done` after end-of-text or a stop string.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.done = "", False

    def feed(self, token: int) -> str:
        """The text that `token` makes certain."""
        if self.done:
            return ""
        if token == self.tokenizer.end_of_text:
            return self.end()
        text = self.held + self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = [i for i in map(text.find, self.stop) if i >= 0]
        if found:
            self.done, self.held = True, ""
            return text[: min(found)]
        # the longest ending of the text that begins a stop string
        keep = max(
            (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What is still held back, when no more tokens come."""
        text = "" if self.done else self.held + self.decoder.decode(b"", final=True)
        self.done, self.held = True, ""
        return text


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Generate text from a checkpoint.", "run")
    settings.check(
        s,
        ("temperature", "at least 0", s.temperature >= 0),
        ("top_k", "at least 0", s.top_k >= 0),
        ("top_p", "above 0 and at most 1", 0 < s.top_p <= 1),
        ("max_tokens", "at least 0", s.max_tokens >= 0),
        ("num_samples", "from 1 to 1024", 1 <= s.num_samples <= 1024),
        ("stop", "text, not nothing", all(s.stop)),
        ("quantize", "int8 or left out", s.quantize in ("", "int8")),
        ("prompt", "left out when prompt_file is given", not (s.prompt and s.prompt_file)),
        ("threads", "auto or a number from 1 to 1024", threads.valid(s.threads)),
        ("prompt", "left out in interactive mode", not (s.prompt and s.interactive)),
    )
    if s.prompt_file == "-":
        s.prompt = sys.stdin.buffer.read().decode(errors="replace")
    elif s.prompt_file:
        with open(s.prompt_file, encoding="utf-8", errors="replace") as f:
            s.prompt = f.read()

    from engine.checkpoint import TO_SAMPLE, find, load_weights, verify

    path = find(s.run, s.checkpoint)
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify, path, TO_SAMPLE)  # while torch is imported
        from engine import inference, machine
    verified.result()
    here = machine.pick(s.device, s.dtype, "false", rows=s.num_samples)
    model, tokenizer, _ = load_weights(path, verified=True)
    model = model.eval().to(here.device, here.dtype)
    machine.use_threads(s.threads, here, model, s.num_samples)
    inference.ready(model, s.quantize, s.num_samples)
    if not s.interactive:
        write_samples(model, tokenizer, s.prompt, s)
        return
    print("Type a prompt; an empty line ends.", file=sys.stderr)
    while prompt := sys.stdin.readline().rstrip("\n"):
        write_samples(model, tokenizer, prompt, s)


def write_samples(model, tokenizer, prompt: str, s: Settings) -> None:
    """Prints prompt and continuation: one sample as it comes, several one after the other."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    limit = model.config.block_size
    if len(ids) > limit:
        note = f"the prompt has {len(ids)} tokens; only its last {limit} fit the context"
        print(note, file=sys.stderr)
    streams = [TextStream(tokenizer, s.stop) for _ in range(s.num_samples)]
    texts = [prompt] * s.num_samples
    if s.num_samples == 1:
        print(prompt, end="", flush=True)
    picked = (s.max_tokens, s.temperature, s.top_k, s.top_p, s.num_samples, s.seed)
    for tokens in generate(model, ids, *picked):
        for i, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            text = stream.feed(token)
            texts[i] += text
            if s.num_samples == 1:
                print(text, end="", flush=True)
        if all(stream.done for stream in streams):
            break
    ends = [stream.end() for stream in streams]
    if s.num_samples == 1:
        print(ends[0])
        return
    for i, (text, end) in enumerate(zip(texts, ends, strict=True), start=1):
        print(f"--- sample {i} of {s.num_samples}\n{text}{end}")


if __name__ == "__main__":
    settings.run(main)
