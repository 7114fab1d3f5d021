"""Requests that are answered side by side: they come and go between two tokens.

    submit ──▶ waiting ──▶ reading ──▶ a slot for each answer ──▶ a token a step ──▶ request.tell

One thread has the model: the first of the process, since OpenMP's threads serve a second one more
slowly. A step of it reads a bounded piece of the prompts that wait, so that nobody else waits long,
and gives each answer its next token (continuous batching: Orca, OSDI 2022).
"""

import math
import random
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.prometheus import Histogram
from engine.transcript import Piece, Transcript
from generate import Answer, Slots, prefill
from model import GPT, KVCache
from pick import pick


class Full(Exception):
    """Too much is waiting already."""


@dataclass
class Request:
    """A prompt, and `n` answers to it, numbered from `first`.

    `tell` gets every Piece of them, or an Exception, in the engine's thread. Whoever does not
    listen any more sets `gone`.
    """

    prompt: list[int]
    n: int
    max_tokens: int  # of an answer
    seed: int
    options: dict  # of `pick`
    transcript: Callable[[], Transcript]
    tell: Callable
    first: int = 0
    top_logprobs: int | None = None  # alternatives to each token; None: no log-probabilities
    of_prompt: bool = False  # log-probabilities of the prompt's tokens, too
    deadline: float = math.inf  # of time.monotonic()
    gone: bool = False
    began: float = field(default_factory=time.monotonic)

    def choices(self, limit: int) -> list["Choice"]:
        """Its answers. Number i has the random numbers that sample i of sample.py has."""
        most = min(self.max_tokens, limit + 1 - len(self.prompt))
        return [
            Choice(i, self.prompt, most, random.Random(f"{self.seed} {i}"), request=self)
            for i in range(self.first, self.first + self.n)
        ]


@dataclass
class Choice(Answer):
    """An answer that is being written, to a request."""

    request: Request | None = None
    last: float = 0.0  # when its last token came

    def __post_init__(self):
        self.transcript = self.request.transcript()

    def piece(self, token: int, score: tuple | None) -> Piece:
        """What its newest token adds, and, if that is the last, what was still held back."""
        piece = self.transcript.feed(token, score)
        finish = self.transcript.finish
        if not finish and len(self.tokens) >= self.most:
            finish = "length"
        if finish:
            piece.add(self.transcript.end())
            piece.finish = self.transcript.finish or finish
        piece.index = self.number
        return piece


class Prefill:
    """Prompts of `requests` that are being read, into a cache of their own."""

    def __init__(self, model: GPT, requests: list[Request]):
        self.model, self.requests = model, requests
        self.cache: KVCache | None = None
        self.read = 0  # tokens, if it is one prompt
        self.scores: list[tuple] = [(requests[0].prompt[0], None, [])]  # the first has no ln p

    def go_on(self, markers, chunk: int, unused: Tensor) -> Tensor | None:
        """Reads up to `chunk` tokens, more only of prompts that see themselves whole; in the end
        the logits of what comes behind each prompt, (B, V)."""
        request = self.requests[0]
        prompt = request.prompt
        if self.cache is None:
            longest = max(len(request.prompt) for request in self.requests)
            self.cache = self.model.new_cache(len(self.requests), longest)
        if len(self.requests) > 1 or sees_itself_whole(self.model, prompt, markers):
            return prefill(self.model, [r.prompt for r in self.requests], self.cache, markers)
        piece = prompt[self.read : self.read + chunk]
        tokens = torch.tensor([piece], device=self.cache.k.device)
        x = self.model.trunk(tokens, cache=self.cache)  # (1, T, C)
        if request.of_prompt:
            following = prompt[self.read + 1 : self.read + 1 + len(piece)]
            logits = self.model.logits(x[0, : len(following)])  # (T, V)
            logits = logits.index_fill(-1, unused, -math.inf)
            self.scores += scored(logits, following, request.top_logprobs)
        self.read += len(piece)
        return self.model.logits(x[:, -1]) if self.read == len(prompt) else None


def sees_itself_whole(model: GPT, prompt: list[int], markers) -> bool:
    return model.config.mask != "causal" and markers is not None and markers.assistant in prompt


class Engine:
    """What has the model, with `count` slots; up to `queue` answers wait for one.

    `run` goes on until `stop`. `exact`: nothing depends on who stands beside, see `Slots`.
    """

    def __init__(self, model: GPT, tokenizer, count: int, queue: int, chunk: int, exact=False):
        self.model, self.tokenizer, self.queue, self.chunk = model, tokenizer, queue, chunk
        self.slots = Slots(model, count, tokenizer.markers, exact)
        device = self.slots.logits.device
        self.unused = torch.tensor(tokenizer.unused, dtype=torch.long, device=device)
        self.changed = threading.Condition()  # guards what other threads touch: the next three
        self.waiting: deque[Request] = deque()
        self.jobs: deque[tuple[Future, Generator]] = deque()
        self.running, self.end = True, math.inf
        self.prefill: Prefill | None = None
        self.counts = Counter()
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()

    # --- for other threads

    def submit(self, requests: list[Request]) -> None:
        """Takes all of them, or raises Full."""
        with self.changed:
            more = sum(request.n for request in requests)
            if self.waiting and self.number_waiting() + more > self.queue:
                raise Full
            self.waiting.extend(requests)
            self.changed.notify()

    def ask(self, job: Generator) -> Future:
        """What `job` returns, which goes on by one step between two tokens. Raises Full."""
        future = Future()
        with self.changed:
            if len(self.jobs) >= self.slots.count:
                raise Full
            self.jobs.append((future, job))
            self.changed.notify()
        return future

    def cut_off(self) -> None:
        """From now on every request is late."""
        self.end = 0.0

    def stop(self) -> None:
        """Ends `run` behind its step."""
        with self.changed:
            self.running = False
            self.changed.notify()

    def number_waiting(self) -> int:
        return sum(request.n for request in [*self.waiting])

    def number_running(self) -> int:
        prefill = self.prefill
        return len(self.slots.writing) + sum(r.n for r in (prefill.requests if prefill else []))

    def used(self) -> float:
        """The share of the KV cache that holds something."""
        cache = self.slots.cache
        return int(cache.lengths.sum()) / (len(cache.lengths) * cache.k.size(3))

    # --- the thread

    def run(self) -> None:
        while True:
            with self.changed:
                busy = self.waiting or self.jobs or self.number_running()
                if self.running and not busy:
                    self.changed.wait(1)  # on Windows nothing else lets a Ctrl-C in
                if not self.running:
                    return
            try:
                self.step()
            except Exception as e:  # of the model: those who are being answered are told
                self.fail(e)

    @torch.inference_mode()
    def step(self) -> None:
        self.dismiss()
        self.do_a_job()
        self.read()
        if self.slots.writing:
            self.give_tokens()
        if self.slots.writing:
            self.slots.decode()

    def active(self) -> list[Request]:
        """Those whose prompt is being read, or has been."""
        prefill = self.prefill.requests if self.prefill else []
        return [*prefill, *(choice.request for choice in self.slots.writing)]

    def dismiss(self) -> None:
        """Whoever is gone, or late, loses the place in the line, or the slot."""
        now, prefill = time.monotonic(), self.prefill
        with self.changed:
            for request in [*self.waiting, *self.active()]:
                if now > min(request.deadline, self.end) and not request.gone:
                    request.gone = True
                    request.tell(TimeoutError())
            self.waiting = deque(request for request in self.waiting if not request.gone)
        if prefill and all(request.gone for request in prefill.requests):
            self.prefill = None
        for row in reversed(range(len(self.slots.writing))):
            if self.slots.writing[row].request.gone:
                self.slots.remove(row)
                self.counts["abort"] += 1

    def do_a_job(self) -> None:
        """A step of the first job."""
        if not self.jobs:
            return
        future, job = self.jobs[0]
        try:
            if not future.cancelled():
                return next(job)
        except StopIteration as e:
            if future.set_running_or_notify_cancel():
                future.set_result(e.value)
        except Exception as e:
            if future.set_running_or_notify_cancel():
                future.set_exception(e)
        self.jobs.popleft()

    def read(self) -> None:
        """A piece of the prompts whose turn it is; what has been read gets its slots."""
        self.prefill = self.prefill or self.next_prefill()
        if not self.prefill:
            return
        logits = self.prefill.go_on(self.tokenizer.markers, self.chunk, self.unused)
        if logits is None:
            return
        for i, request in enumerate(self.prefill.requests):
            self.counts["prompt"] += len(request.prompt)
            choices = request.choices(self.model.config.block_size)
            for choice in choices:
                if request.of_prompt:
                    piece = choice.transcript.of_prompt(self.prefill.scores)
                    request.tell(replace(piece, index=choice.number))
                if choice.most < 1:  # the prompt alone was wanted
                    self.finish(choice, Piece(choice.number, finish="length"))
            choices = [choice for choice in choices if choice.most > 0]
            if choices:
                self.slots.place(choices, self.prefill.cache.rows(i, i + 1), logits[i : i + 1])
        self.prefill = None

    def next_prefill(self) -> Prefill | None:
        """The first that waits, if it has room, and those behind it that fit the same pass."""
        some, free = [], self.slots.free()
        with self.changed:
            while self.waiting and self.waiting[0].n <= free:
                both = [*some, self.waiting[0]]
                alone = self.slots.exact or any(request.of_prompt for request in both)
                longest = max(len(request.prompt) for request in both)
                if some and (alone or longest * len(both) > self.chunk):
                    break
                some = both
                free -= self.waiting.popleft().n
        return Prefill(self.model, some) if some else None

    def give_tokens(self) -> None:
        """Each answer gets its next token; those that have ended leave their slots."""
        writing = [*self.slots.writing]
        logits = self.slots.logits[: len(writing)].index_fill(-1, self.unused, -math.inf)  # (B, V)
        tokens, now = chosen(writing, logits), time.monotonic()
        for row in reversed(range(len(writing))):  # the last first: one that ends moves another
            choice, token, score = writing[row], tokens[row], None
            asked = choice.request.top_logprobs
            if asked is not None:
                [score] = scored(logits[row : row + 1], [token], asked)
            if choice.tokens:
                self.between.add(now - choice.last)
            else:
                self.first.add(now - choice.request.began)
            choice.last = now
            choice.tokens.append(token)
            self.counts["generation"] += 1
            piece = choice.piece(token, score)
            if piece.finish:
                self.slots.remove(row)
                self.finish(choice, piece)
            else:
                choice.request.tell(piece)

    def finish(self, choice: Choice, piece: Piece) -> None:
        self.counts[piece.finish] += 1
        self.whole.add(time.monotonic() - choice.request.began)
        choice.request.tell(piece)

    def fail(self, e: Exception) -> None:
        """Whoever is being answered is told; the log has the reason."""
        traceback.print_exception(e)
        for request in self.active():
            if not request.gone:
                request.gone = True
                request.tell(e)
        self.prefill = None
        self.slots.writing.clear()
        self.slots.cache.lengths.zero_()


def chosen(writing: list[Choice], logits: Tensor) -> list[int]:
    """The next token of each answer, by its own options, from its row of logits (B, V)."""
    uniform = torch.tensor([choice.draw.random() for choice in writing], dtype=torch.float64)
    alike: dict[tuple, list[int]] = {}  # rows that choose in the same way
    for row, choice in enumerate(writing):
        alike.setdefault((*choice.request.options.items(),), []).append(row)
    tokens = [0] * len(writing)
    for options, rows in alike.items():
        some = pick(logits[rows], uniform[rows], **dict(options)).tolist()
        for row, token in zip(rows, some, strict=True):
            tokens[row] = token
    return tokens


def scored(logits: Tensor, tokens: list[int], alternatives: int) -> list[tuple]:
    """(id, ln p, the likeliest [(id, ln p)]) of each of `tokens`, by its row of logits (T, V)."""
    ln_p = logits.float().log_softmax(dim=-1)
    found = ln_p.gather(-1, torch.tensor(tokens, device=ln_p.device)[:, None])[:, 0].tolist()
    best, ids = (x.tolist() for x in ln_p.topk(min(alternatives, ln_p.size(-1)), dim=-1))
    pairs = ([*zip(i, p, strict=True)] for i, p in zip(ids, best, strict=True))
    return [*zip(tokens, found, pairs, strict=True)]
