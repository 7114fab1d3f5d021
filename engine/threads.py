"""How the threads of torch wait, and how many are worth having. Needs no torch.

Between two operations OpenMP's threads wait for work. By default they spin, which saves some
microseconds on an idle machine, but beside a busy process a spinning thread holds the core that the
working one is waiting for: every operation then takes a time slice, up to a hundred times as long.
"""

import math
import os
from pathlib import Path

GRAIN = 65_536  # activations (tokens x width) in one pass for which one more thread pays, measured
WEIGHTS = 500_000  # parameters for which it does, however few the tokens


def wait_passively() -> None:
    """Lets idle threads sleep. OpenMP reads this once, when torch is loaded: so call it before.

    The variable is OpenMP's own: GNU's library (torch on Linux) then does not spin, and LLVM's and
    Intel's (macOS, Windows) take a block time of 0. Who has set it knows better.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def valid(threads: str) -> bool:
    """Whether a setting is "auto" or a number of threads."""
    return threads == "auto" or (threads.isdecimal() and 1 <= int(threads) <= 1024)


def choose(available: int, tokens: int, width: int, parameters: int) -> int:
    """How many threads to use for passes of `tokens` positions through a model.

    Small work is done before another thread is awake. The load of the machine does not count:
    sleeping threads do no harm beside it, and equal commands should give equal bits.
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
