"""How the threads of torch wait, and how many are worth having. Needs no torch.

Between two operations OpenMP's threads wait for work. Spinning saves some microseconds each time,
on two idle cores a third of a small step. But beside a busy process a spinning thread holds the
core that the working one is waiting for: an operation can then take a time slice, up to a hundred
times as long. Sleeping costs little there. docs/speed.md has the figures.
"""

import math
import os
import time
from pathlib import Path

GRAIN = 65_536  # activations (tokens x width) in one pass for which one more thread pays, measured
WEIGHTS = 500_000  # parameters for which it does, however few the tokens
EXPLORE = 64  # times, at least, until the slower of two ways is tried again: costs a percent or two
SPIN = 3_000  # rounds, some thirty microseconds: what that costs and saves is in docs/speed.md


def choose_waiting() -> None:
    """Lets idle threads sleep; at once, if others need the cores, else after a short spin.

    These variables are read once, when torch and numpy are loaded: so call it before. GNU's library
    (torch on Linux) knows both of OpenMP's; LLVM's and Intel's (macOS, Windows) the first, as a
    block time of 0. Who has set one knows better.
    """
    # numpy's own threads fall asleep after 2^20 cycles, a third of a millisecond, and not 2^26
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    if cores_are_idle():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN)
    else:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def cores_are_idle(samples: int = 4, path: str = "/proc/loadavg") -> bool:
    """Whether there are as many idle cores as this process may use (Linux; elsewhere unknown)."""
    if not hasattr(os, "sched_getaffinity") or not os.path.exists(path):
        return False
    mine, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if quota() < mine:
        return False
    others = []
    for _ in range(samples):  # a process that wakes up for a moment is not a busy one
        running = Path(path).read_text().split()[3].split("/")[0]  # as in 0.20 0.18 0.12 1/80 5
        others.append(int(running) - 1)  # this process is one of them
        time.sleep(0.005)
    return all_of_them - sorted(others)[samples // 2] >= mine


def valid(threads: str) -> bool:
    """Whether a setting is "auto" or a number of threads."""
    return threads == "auto" or (threads.isdecimal() and 1 <= int(threads) <= 1024)


def choose(available: int, tokens: int, width: int, parameters: int) -> int:
    """How many threads to use for passes of `tokens` positions through a model.

    Small work is done before another thread is awake. The load of the machine does not count:
    sleeping threads do no harm beside it, and what is trained by equal commands should have equal
    bits.
    """
    worth = max(tokens * width / GRAIN, parameters / WEIGHTS)
    return max(1, math.ceil(min(worth, available, quota())))


def quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> float:
    """How many cores the control groups of this process grant (Linux, containers), or infinity."""
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:
        return math.inf  # not Linux
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(root, controllers, path.strip("/"))
        for folder in (group, *group.parents):  # a group shares what those above it have
            for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
                try:
                    granted, period = " ".join((folder / f).read_text() for f in files).split()
                except (OSError, ValueError):
                    continue
                if granted not in ("max", "-1"):
                    limits.append(int(granted) / int(period))
    return min(limits)


class AllOrOne:
    """Whether work that is done again and again gets all threads, or one: what took less time
    lately. Now and then the other way is tried, the more rarely the longer it takes.

    Beside a busy process threads wait for the one that shares its core; one alone does not.
    """

    def __init__(self):
        self.seconds: dict[bool, float] = {}  # with all threads, with one
        self.times, self.trial = 0, 3

    def together(self) -> bool:
        """Whether the next one gets all."""
        self.times += 1
        better = self.seconds.get(True, 0.0) <= self.seconds.get(False, math.inf)
        return better != (self.times >= self.trial)

    def took(self, together: bool, seconds: float) -> None:
        """How long the last one took: of what is mostly done a mean that forgets."""
        if self.times == 1:  # which finds nothing in the caches
            return
        mean = self.seconds.get(together)
        if self.times >= self.trial:
            self.seconds[together] = seconds
            rarely = max(1.0, seconds / self.seconds.get(not together, seconds))
            self.trial = self.times + math.ceil(EXPLORE * rarely)
        else:  # what takes far longer once says little
            self.seconds[together] = mean + (min(seconds, 2 * mean) - mean) / 4 if mean else seconds
