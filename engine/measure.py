"""For bench.py: where to measure, variants in turn, each in a process of its own, their table."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

try:
    import resource
except ImportError:  # on Windows nobody tells the peak of memory
    resource = None

WARM_UP = 2  # calls in each measurement that do not count


def machine_for(dtype: str, products: bool = True, gpu: bool = False):
    """The machine with that number type. ValueError if it would emulate its matrix products, or if
    it has to be a GPU: elsewhere compiled kernels do not pay (docs/speed.md)."""
    from engine import machine

    fast = machine.pick()
    here = machine.pick(dtype=dtype)
    if products and dtype == "bfloat16" and here.dtype != fast.dtype:
        raise ValueError(f"no fast bfloat16 here, and emulating it takes minutes: {fast.why}")
    if gpu and here.device.type != "cuda":
        raise ValueError("compiled and not compiled are compared on a GPU")
    return here


def dimensions(s) -> dict:
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    return {name: getattr(s, name) for name in names}


def timed(calls: int, function: Callable) -> float:
    """The median duration of `calls` of `function`, in seconds, after a warm-up.

    They are counted, and not as many as fit a time: several processes must agree on their number.
    """
    times: list[float] = []
    for _ in range(WARM_UP + calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def figure(value: float, unit: str, more: str = "", of_children: bool = False) -> dict:
    """With the peak of memory of this process, or of the largest of its children; of a GPU's, if
    one is at work."""
    peak, torch = None, sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated() / 1e6
    elif resource:
        scale = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, else in kB
        whose = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
        peak = resource.getrusage(whose).ru_maxrss / scale
    return dict(value=value, unit=unit, peak_mb=peak, more=more)


def in_turn(names: list[str], rounds: int, command: list[str]) -> dict[str, list[dict]]:
    """The figures that `command` prints with --only=NAME, by name.

    The variants take turns, so that a machine that is slower for a while is slower for all. One
    that fails is left out from then on, and the last line that it wrote says why.
    """
    found: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(found):
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            argv = [*command, f"--only={name}"]
            done = subprocess.run(argv, capture_output=True, encoding="utf-8")
            if done.returncode == 0:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"  left out: {reason}", file=sys.stderr)
                del found[name]
    return found


def print_table(found: dict[str, list[dict]]) -> None:
    """Medians, a row a variant; the first row with the same unit is what ratios refer to."""
    first: dict[str, float] = {}
    print(f"{'variant':34} {'median':>10} {'unit':12} {'ratio':>6}  {'peak MB':>8}  more")
    for name, runs in found.items():
        value = statistics.median(run["value"] for run in runs)
        unit, more = runs[0]["unit"], runs[0]["more"]
        ratio = value / (first.setdefault(unit, value) or 1)
        peaks = [run["peak_mb"] for run in runs]
        peak = "-" if None in peaks else f"{statistics.median(peaks):,.0f}"
        print(f"{name:34} {value:>10,.2f} {unit:12} {ratio:>6.2f}  {peak:>8}  {more}")
