"""Work that is shared out to processes, and lines that say how far it is."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

from engine.sources import PIECE
from engine.spool import chunks


def clean_up_when_told_to_end() -> None:
    """SIGTERM unwinds like Ctrl-C, so that half-written folders go; the exit status is 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextmanager
def processes(count: int, prepare: Callable | None = None, *arguments):
    """A function that has chunks of a spool file worked on by `count` processes (0: all cores).

    Each process calls `prepare(*arguments)` first. A single chunk is worked on in this one, since
    it takes less time than another process to begin.
    """
    if not count:  # all that this process may use
        mine = hasattr(os, "sched_getaffinity")
        count = len(os.sched_getaffinity(0)) if mine else os.cpu_count() or 1

    def each_chunk(what: str, function: Callable, path: Path, numbers=None) -> Iterator:
        """function(path, number) of all chunks, or those, in order; never far ahead."""
        numbers = range(chunks(path)) if numbers is None else numbers
        left, waiting = iter(numbers), deque()
        with Progress(what, len(numbers) * PIECE) as progress:
            if len(numbers) == 1:
                ready_here()
                yield function(path, *numbers)
                return
            for done in range(len(numbers)):
                some = islice(left, 2 * count - len(waiting))
                waiting.extend(pool.submit(function, path, number) for number in some)
                yield waiting.popleft().result()
                progress((done + 1) * PIECE)

    ready_here = cache(lambda: prepare and prepare(*arguments))  # once
    start = dict(initializer=start_process, initargs=(prepare, arguments))
    try:
        with ProcessPoolExecutor(count, get_context("spawn"), **start) as pool:
            yield each_chunk
    except BrokenProcessPool as e:
        raise ValueError(
            "a process was killed, perhaps for want of memory: use fewer --workers"
        ) from e


def start_process(prepare: Callable | None, arguments: tuple) -> None:
    """Ends a process when the one that started it has died, for whatever reason."""
    parent = parent_process()
    if parent:
        wait = threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True)
        wait.start()
    if prepare:
        prepare(*arguments)


class Progress:
    """A line on stderr that says how far a stage is: rewritten on a terminal, else rare."""

    def __init__(self, what: str, total: int = 0, unit: float = 1e6, name: str = " MB"):
        self.what, self.total, self.unit, self.name = what, total, unit, name
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __enter__(self):
        if self.terminal:  # at once: the first figure may be long in coming
            print(f"\r\033[K{self.what}", end="", file=sys.stderr, flush=True)
        return self

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last < (0.2 if self.terminal else 10):
            return
        self.last, done = now, done / self.unit
        of = f" of {self.total / self.unit:,.0f}" if self.total else ""
        line = f"{self.what}: {done:,.0f}{of}{self.name}, {done / (now - self.start):,.1f} a second"
        line = f"\r\033[K{line}" if self.terminal else line + "\n"
        print(line, end="", file=sys.stderr, flush=True)

    def __exit__(self, *error) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
