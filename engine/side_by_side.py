"""Muon's matrices side by side, a share of them in each thread.

Batched products of float32 have one thread on a CPU, whatever torch may use (MKL, PyTorch 2.13):
of a step of config/small.py an eighth went to one core, while the other waited.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from optim import Muon


class ThreadedMuon(Muon):
    """The same numbers, by all threads of this moment."""

    def directions(self, ahead: list[Tensor]) -> list[Tensor]:
        threads = torch.get_num_threads()
        if threads == 1 or len(ahead) < threads:
            return super().directions(ahead)
        ends = [len(ahead) * i // threads for i in range(threads + 1)]
        mine, *others = (ahead[i:end] for i, end in pairwise(ends))
        at_work = [pool(os.getpid(), threads - 1).submit(self.alone, part) for part in others]
        torch.set_num_threads(1)  # of this thread alone, as in the others
        try:
            found = super().directions(mine)
        finally:
            torch.set_num_threads(threads)
        return found + [update for work in at_work for update in work.result()]

    @torch.no_grad()  # that of `step` is another thread's
    def alone(self, part: list[Tensor]) -> list[Tensor]:
        return super().directions(part)


@cache
def pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def use_threads(optimizers: list) -> None:
    for optimizer in optimizers:
        if type(optimizer) is Muon and optimizer.dtype == torch.float32:
            optimizer.__class__ = ThreadedMuon
