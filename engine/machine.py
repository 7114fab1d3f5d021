"""What this computer can do: device, number type, compilation, processes under torchrun."""

import atexit
import ctypes
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Machine:
    """Where and how to compute. `rank` of `world` processes; `why` explains the choices."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int
    world: int
    why: str

    def autocast(self):
        """The context of a forward pass: matrix products in `dtype`, parameters stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def put(self, array: np.ndarray) -> torch.Tensor:
        """An array of token ids as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def first_does(self, function):
        """What `function` returns in the first process, None in the others.

        If it fails there, with ValueError or OSError, all processes end: the first one says why.
        """
        result = problem = None
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as e:
                problem = e
        if self.sum([problem is not None])[0]:
            raise problem or SystemExit(2)
        return result

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum of `values` over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def pick(device: str = "auto", dtype: str = "auto", compile: str = "auto") -> Machine:
    """Chooses what is "auto". Raises ValueError for what is not to be had here."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in has if has[k]) if device == "auto" else device.split(":")[0]
    if not has.get(kind):
        there = ", ".join(k for k in has if has[k])
        raise ValueError(f"device={device!r} is not to be had here: choose auto or one of {there}")
    if world > 1 and kind == "mps":
        if device != "auto":
            raise ValueError(f"device={device!r} serves one process: use cpu, or no torchrun")
        kind = "cpu"
    if world > 1 and kind == "cuda":
        device = f"cuda:{local}"
    try:
        chosen = torch.device(kind if device == "auto" else device)
    except RuntimeError as e:
        raise ValueError(f"device={device!r} is not to be had here: choose auto or {kind}") from e
    if kind == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device={str(chosen)!r} is not to be had: there are {count} GPUs")
    why = [f"{world} process{'es' if world > 1 else ''} on {chosen}"]

    fast, reason = fast_dtype(kind)
    name = fast if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: choose auto, {', '.join(DTYPES)}")
    why.append(f"{name} ({reason if dtype == 'auto' else 'as asked'})")

    if compile not in ("auto", "true", "false"):
        raise ValueError(f"compile={compile!r} should be auto, true or false")
    if compile == "auto":
        compiled = kind == "cuda"
        reason = "pays on a GPU" if compiled else "takes longer than it saves in a short run"
    else:
        compiled, reason = compile == "true", "as asked"
    if compiled and kind == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("compile='true' needs a C++ compiler on a CPU: install g++ or use false")
    why.append(f"{'compiled' if compiled else 'not compiled'} ({reason})")
    if kind == "cpu":
        why.append(f"{torch.get_num_threads()} threads")
    return Machine(chosen, DTYPES[name], compiled, rank, world, ", ".join(why))


def start(here: Machine, deterministic: bool) -> None:
    """Makes equal runs give equal bits (always on a CPU), and connects the processes."""
    if deterministic or here.device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
    elif sys.platform == "linux":
        # keep freed memory instead of returning it: page faults take a tenth of a small step
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(option, value)
    if here.world > 1:
        backend, how = "nccl" if here.device.type == "cuda" else "gloo", {}
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0" and os.environ["GROUP_WORLD_SIZE"] == "1":
            # torchrun on one machine keeps its store over restarts, and in it the addresses of
            # processes that have died: a prefix tells the attempts apart
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            how = dict(store=dist.PrefixStore(f"attempt {attempt}", store))
            how |= dict(rank=here.rank, world_size=here.world)
        # the first process may have a corpus to prepare or terabytes to verify
        dist.init_process_group(backend, timeout=timedelta(hours=2), **how)
        here.sum([0])  # all are here: NCCL alone would not wait
        atexit.register(dist.destroy_process_group)


def seed(*key: int) -> None:
    """Sets torch's random state to a function of `key`, so that there is no state to save."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class GradientSum:
    """Sums gradients over all processes, each as soon as the backward pass has finished it.

    While `active`; `wait` ends the sum. The loss of each process must already be divided by the
    number of targets of the whole batch.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.active, self.pending = False, []
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.begin)

    def begin(self, p: nn.Parameter) -> None:
        if self.active:
            self.pending.append(dist.all_reduce(p.grad, async_op=True))

    def wait(self) -> None:
        for work in self.pending:
            work.wait()
        self.pending.clear()


def fast_dtype(kind: str) -> tuple[str, str]:
    """The fastest sound number type of a kind of device, and the reason."""
    if kind == "cuda":
        if torch.cuda.get_device_capability() >= (8, 0):
            return "bfloat16", "fast on this GPU"
        return "float16", "bfloat16 is slow on this GPU"
    if kind == "cpu":
        # emulated bfloat16 is up to forty times slower than float32
        native = [torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported]
        if not any(test() for test in native):
            return "float32", "no fast bfloat16 on this CPU"
        return "bfloat16", "fast on this CPU"
    return "float32", "the safe choice on this device"
