"""Memory for time: what a pass has to remember, and how many windows at once fit."""

import math
import os
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from engine.machine import Machine, trial_pass
from model import Block


def checkpoint_blocks(learner: nn.Module) -> None:
    """Lets each block remember its input alone, and compute the rest once more in the backward
    pass: a third more time, for memory that grows with depth by (B, T, C) a block instead of by all
    that it computes (arXiv:1604.06174). The same bits: dropout falls as it did."""
    for block in learner.modules():
        if isinstance(block, Block):
            block.forward = partial(remember_little, block.forward)


def remember_little(forward, x, rope, mask, cache):
    if cache is not None or not torch.is_grad_enabled():
        return forward(x, rope, mask, cache)
    return checkpoint(forward, x, rope, mask, cache, use_reentrant=False)


# --- --device_batch=auto

# how much of what is free may be taken. The memory of a CPU is everybody's, and what is freed there
# leaves gaps: resident memory grew by 1.1 to 3 times what tensors take
SHARE = dict(cuda=0.9, cpu=0.33, mps=0.33)


def device_batch(learner: nn.Module, batch, here: Machine, before: dict | None) -> int:
    """How many windows of this batch, which is a process's share, a pass has memory for: found now,
    or, where the run's circumstances `before` were these, then: other passes make other bits."""
    s, before = learner.objective.s, before or {}
    now = dict(processes=here.world, device=here.device.type, shard=s.shard)
    if before.get("device_batch") and now == {name: before.get(name) for name in now}:
        found, why = before["device_batch"], "as before: a number changes it"
    else:
        inputs, _ = next(learner.objective.exercises(batch, learner))
        found, why = most_windows(learner, inputs, here)
    here.say(f"device_batch=auto: {found} windows in a pass ({why})")
    return found


def most_windows(learner: nn.Module, inputs: tuple, here: Machine) -> tuple[int, str]:
    """The most of these windows, by a divisor of their number, that one pass has memory for in
    every process; and why. Tries passes that change nothing."""
    share = len(inputs[0])
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    # what a pass takes grows in a line: the slope is that of one window, the rest are weights
    # The first pass of all also takes what stays, such as workspaces of the GPU's libraries
    _, one, two = (pass_bytes(learner, inputs, min(n, share), here) for n in (1, 1, 2))
    each, fixed = max(two - one, 1), max(2 * one - two, 0)
    if here.compile and not hasattr(learner, "unshard"):  # sharded, only blocks are compiled
        each += whole_logits(learner, inputs, here)
    room = SHARE[here.device.type] * free_bytes(here) - moments(learner)
    fits = max(n for n in sizes if n == 1 or fixed + n * each <= room)
    most = int(min(here.of_each(fits)))
    # alone, a process can find out: sharded, one that fails would leave the others waiting
    while here.device.type == "cuda" and most > 1 and not hasattr(learner, "unshard"):
        try:
            pass_bytes(learner, inputs, most, here)
            fits = most
        except torch.OutOfMemoryError:
            fits = max(n for n in sizes if n < most)
        torch.cuda.empty_cache()  # what has failed is let go of by now
        least = int(min(here.of_each(fits)))
        if least == most:
            break
        most = least
    return most, f"{each / 1e6:,.1f} MB each, and room for {max(room - fixed, 0) / 1e6:,.0f} MB"


def whole_logits(learner: nn.Module, inputs: tuple, here: Machine) -> int:
    """What a window takes in a compiled pass beside what is tried, which is not compiled and has
    logits in pieces: they are whole, and so is their gradient (engine/kernels.py)."""
    padded = math.ceil(learner.gpt.config.vocab_size / 64) * 64
    return 2 * here.dtype.itemsize * inputs[0].shape[1] * padded


def pass_bytes(learner: nn.Module, inputs: tuple, windows: int, here: Machine) -> int:
    """What a pass, forward and backward, takes at most, in bytes."""
    peak = PeakOfGPU(here.device) if here.device.type == "cuda" else Peak()
    with peak:
        trial_pass(learner, here, [z if z is None else z[:windows] for z in inputs])
    return peak.bytes


class Peak(TorchDispatchMode):
    """Within, `bytes` is the most that tensors which were made here have taken at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.bytes = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if type(tensor) is Tensor and tensor.device.type != "meta":
                self.note(tensor.untyped_storage())
        return found

    def note(self, storage) -> None:
        key = storage._cdata
        if key not in self.live:
            size = storage.nbytes()
            self.live[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.now += size
            self.bytes = max(self.bytes, self.now)

    def forget(self, key: int, size: int) -> None:
        del self.live[key]
        self.now -= size


class PeakOfGPU:
    """The same, as the allocator of a GPU tells."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *_):
        self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


def moments(learner: nn.Module) -> int:
    """What optimizers will keep beside the weights: not there yet when passes are tried."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in learner.parameters())
    return sum(2 * p.nbytes for p in local if p.requires_grad)


def free_bytes(here: Machine) -> float:
    """Memory that this process may take, of those on this machine."""
    if here.device.type == "cuda":
        known = torch.cuda.memory_reserved(here.device) - torch.cuda.memory_allocated(here.device)
        return torch.cuda.mem_get_info(here.device)[0] + known
    found = []
    with suppress(AttributeError, ValueError):  # half of what there is, if nobody says what is free
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2]
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in open("/proc/meminfo"))
        found = [1024 * int(lines["MemAvailable"].split()[0])]
    with suppress(OSError, ValueError):  # a container may have less, or no bound: "max"
        limit, used = (Path("/sys/fs/cgroup", f"memory.{x}") for x in ("max", "current"))
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found or [math.inf]) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
