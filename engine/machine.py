"""What this computer can do: device, number type, compilation, threads, and processes as one."""

import atexit
import ctypes
import importlib.util
import os
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from engine import blas, threads

AVAILABLE = torch.get_num_threads()  # torch knows affinity, physical cores and OMP_NUM_THREADS
BUCKET = 25_000_000  # bytes of gradients in one message, as measured in arXiv:2006.15704
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h
PR_SET_PDEATHSIG = 1  # of prctl, from linux/prctl.h
LARGE = 100_000_000  # parameters from which one row is faster in bfloat16: docs/speed.md


@dataclass
class Machine:
    """Where and how to compute. `rank` of `world` processes; `why` explains the choices."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int
    world: int
    why: str
    gradients: "GradientSum | None" = None  # of the model that learns

    def autocast(self):
        """The context of a forward pass: matrix products in `dtype`, parameters stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def put(self, array: np.ndarray | None) -> torch.Tensor | None:
        """An array as a tensor on the device; None stays None."""
        if array is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def first_does(self, function, meanwhile=lambda: None):
        """What `function` returns in the first process, None in the others, which do `meanwhile`.

        If it fails there, with ValueError or OSError, all processes end: the first one says why.
        """
        result = problem = None
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as e:
                problem = e
        else:
            meanwhile()
        if self.sum([problem is not None])[0]:
            try:
                raise problem or SystemExit(2)
            finally:
                del problem  # whose traceback knows this frame: a circle would keep locks held
        return result

    def say(self, text: str) -> None:
        """Prints: the first process speaks for all."""
        if self.rank == 0:
            print(text)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process: so that all decide alike."""
        return self.sum([bool(flag)])[0] > 0

    def from_first(self, value: float) -> float:
        """`value` as the first process has it; what the others have does not count."""
        return self.sum([value if self.rank == 0 else 0])[0]

    def of_each(self, value: float) -> list[float]:
        """`value` of every process, in order of rank."""
        return self.sum([value if rank == self.rank else 0 for rank in range(self.world)])

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum of `values` over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def pick(
    device: str = "auto", dtype: str = "auto", compile: str = "auto", rows: int = 0, size: int = 0
) -> Machine:
    """Chooses what is "auto"; `rows` is 0 to train, else the number of texts to generate at once by
    a model of `size` parameters.

    Raises ValueError for what is not to be had here.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device, world)
    why = [f"{world} process{'es' if world > 1 else ''} on {chosen}"]
    fast, reason = (dtype, "as asked") if dtype != "auto" else fast_dtype(chosen, rows, size)
    why.append(f"{fast} ({reason})")
    compiled, reason = compile == "true", "as asked"
    if compile == "auto":
        compiled, reason = worth_compiling(chosen)
    why.append(f"{'compiled' if compiled else 'not compiled'} ({reason})")
    if compiled and chosen.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("compile='true' needs a C++ compiler on a CPU: install g++ or use false")
    return Machine(chosen, getattr(torch, fast), compiled, rank, world, ", ".join(why))


def pick_device(device: str, world: int) -> torch.device:
    """The device of this process, one of `world`. Raises ValueError if it is not to be had."""
    can = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    can["mps"] &= world == 1  # it serves one process
    there = [kind for kind in can if can[kind]]
    kind, _, number = (there[0] if device == "auto" else device).partition(":")
    if kind not in there or not (number or "0").isdecimal():
        there = ", ".join(there)
        raise ValueError(f"device={device!r} is not to be had here: choose auto or one of {there}")
    if kind != "cuda":
        return torch.device(kind)
    count, index = torch.cuda.device_count(), int(number or 0)
    if world > 1:
        # every process looks at the number of all, so that all say the same, and one of them aloud
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if local > count:
            raise ValueError(f"{local} processes and {count} GPUs: use --nproc_per_node={count}")
        index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise ValueError(f"device='cuda:{index}' is not to be had: there are {count} GPUs")
    return torch.device("cuda", index)  # torch.cuda.set_device needs an index


def fast_dtype(device: torch.device, rows: int, size: int) -> tuple[str, str]:
    """The fastest sound number type on a device; and why. `rows` and `size` as in `pick`."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bfloat16", "fast on this GPU") if fast else ("float16", "for want of bfloat16")
    if device.type == "mps":
        return "float32", "the safe choice there"
    fast = fast_bfloat16()
    if rows == 1 and size >= LARGE and (fast or torch.cpu.get_capabilities().get("avx2")):
        # one row waits for the weights to come from memory. Half the bytes come sooner, even where
        # they must be widened before the product; of a smaller model, which waits less, later
        return "bfloat16", "half the bytes to read"
    if fast:
        return ("float32", "faster for one text") if rows == 1 else ("bfloat16", "fast here")
    return "float32", "bfloat16 is slow here"  # up to forty times slower, being emulated


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 by instructions of its own."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def worth_compiling(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile pays and can work, and the reason."""
    if device.type != "cuda":
        return False, "pays on a GPU only"
    # its kernels are written in Triton, which needs a GPU since Volta and a compiler of C
    if torch.cuda.get_device_capability(device) < (7, 0):
        return False, "too old a GPU"
    return not no_triton(), no_triton() or "pays on a GPU"


def no_triton() -> str:
    """What kernels written in Triton lack here, or "" if nothing."""
    if not importlib.util.find_spec("triton"):
        return "no Triton"
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "no C compiler"
    return ""


def use_threads(asked: str, here: Machine, model: nn.Module, tokens: int, before=None) -> None:
    """Sets the number of threads, torch's and numpy's, for passes of `tokens` positions.

    `asked` is "auto" or a number. auto obeys OMP_NUM_THREADS (torchrun sets it), keeps the number
    of the run that is resumed, whose `before` is what `Run.circumstances` were, and otherwise
    goes by the size of the work. A GPU's work needs one thread: there torch's number stays.
    """
    if asked != "auto":
        torch.set_num_threads(int(asked))
    elif here.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        mine = max(1, AVAILABLE // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        size = sum(p.numel() for p in model.parameters())
        number = threads.choose(mine, tokens, model.config.n_embd, size)
        same = before and before["processes"] == here.world and before["device"] == "cpu"
        if same and before["threads"] <= mine:
            number = before["threads"]  # for the same bits
        torch.set_num_threads(number)
    blas.use_threads(torch.get_num_threads())


def spare_compiler() -> None:
    """torch's optimizers load its compiler, two and a half seconds of a start, only to tell it to
    leave them alone; here nobody compiles them. What they wrap is called without that wrapping: if
    another torch has none, nothing changes."""
    for function in vars(torch.optim.Optimizer).values():
        if plain := getattr(function, "__wrapped__", None):
            plain.__dynamo_disable = plain  # torch takes what is noted here, and asks no compiler
    for kind in (torch.optim.Adam, torch.optim.NAdam):  # AdamW's step is Adam's
        if plain := getattr(kind.step, "__wrapped__", None):
            kind.step = torch.no_grad()(plain)


@contextmanager
def shapes_only():
    """Within, a model that is made has shapes and no numbers."""
    with torch.device("meta"), Unfilled():
        yield


class Unfilled(TorchFunctionMode):
    """Within, no table draws its first numbers. With shapes only it has none to draw, but torch
    would load its compiler to find that out: two and a half seconds of a start."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nn.init.normal_:
            return function(*args, **(kwargs or {}))


def start(here: Machine, deterministic: bool) -> None:
    """Makes equal runs give equal bits (always on a CPU), and connects the processes."""
    spare_compiler()
    if deterministic or here.device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        # as use_deterministic_algorithms(True), which would load torch's compiler: a second or two
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
    elif sys.platform == "linux":
        # keep freed memory instead of returning it: page faults take a tenth of a small step
        for option, value in ((M_MMAP_THRESHOLD, 1 << 23), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
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
        if sys.platform == "linux":  # the end of the launcher is a request to stop
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # the first process may have a corpus to prepare or terabytes to verify
        dist.init_process_group(backend, timeout=timedelta(hours=2), **how)
        here.sum([0])  # all are here: NCCL alone would not wait
        # after a traceback nobody waits for the others, which may be stuck
        atexit.register(lambda: hasattr(sys, "last_value") or dist.destroy_process_group())


def compile(learner: nn.Module, here: Machine, inputs: list) -> None:
    """Compiles a learner for exercises like this one: which takes a minute, and is done now, by one
    pass, before there is anything that a request to stop could lose. (Where text is mixed with
    rows, the other form is compiled when it comes up.) `learner.forward` is still what it was.
    Of one that is sharded each block is compiled: between them weights are gathered."""
    sharded = [m for m in learner.modules() if hasattr(m, "unshard") and m is not learner]
    for module in sharded or [learner]:
        module.compile()
    trial_pass(learner, here, inputs)


def trial_pass(learner: nn.Module, here: Machine, inputs: list) -> None:
    """One pass, forward and backward, that changes nothing."""
    try:
        with here.autocast():
            sums = learner(*map(here.put, inputs))
        sum(s for s in sums if s.requires_grad).backward()
    finally:
        learner.zero_grad(set_to_none=True)


def seed(*key: int) -> None:
    """Sets torch's random state to a function of `key`, so that there is no state to save."""
    number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # which would note the stack each time, 0.3 ms, for a GPU that may come
        torch.default_generator.manual_seed(number)


class GradientSum:
    """Sums the gradients of all processes, a bucket of them in one message (arXiv:2006.15704).

    For each of many small gradients a message would take longer to start than to travel. While
    `active`, a bucket is sent as soon as the backward pass has finished its last gradient, and
    travels while the pass goes on; that pass must be the last before `wait`, which ends the sum. A
    compiled model hands over all gradients when its whole pass has ended: then nothing overlaps.
    The loss of each process must already be divided by the number of targets of the whole batch.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.active, self.buckets, self.home = False, [], {}
        room = 0
        learned = [p for p in parameters if p.requires_grad]
        for p in reversed(learned):  # about the order in which the backward pass reaches them
            if not self.buckets or p.nbytes > room:
                self.buckets.append([])
                room = BUCKET
            room -= p.nbytes
            self.home[p] = len(self.buckets) - 1
            self.buckets[-1].append(p)
            p.register_post_accumulate_grad_hook(self.note)
        self.begin()

    def begin(self) -> None:
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients, in each bucket
        self.sent: list[tuple] = []  # of the first buckets: the flat sum, and the work under way

    def note(self, p: nn.Parameter) -> None:
        if not self.active:
            return
        self.missing[self.home[p]] -= 1
        # one after the other, in all processes alike: messages are matched by their order
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self.send()

    def send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        # a parameter that was not used here may have been used in another process
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.flatten() for part in parts])
        for p in bucket:
            p.grad = None  # it lives on in `flat`
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def wait(self) -> None:
        while len(self.sent) < len(self.buckets):
            self.send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)
        self.begin()
