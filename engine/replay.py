"""One token after another: a step that is recorded once and replayed, for one text and the next.

On a GPU it is a CUDA graph, on a CPU a list of operations (engine/recording.py). Either can be
joined further, by kernels (engine/one_token.py) or loops (engine/one_token_cpu.py), where a process
writes so much that these pay.
"""

import os
import weakref
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from cache import KVCache
from engine import blas, fast, recording
from model import GPT, GPTConfig


def records(device: torch.device, batch: int = 1) -> bool:
    """On a GPU, but for what a scatter does to be deterministic, which cannot be recorded. Several
    texts on a CPU have lengths of their own, and wait for products, not for Python."""
    if device.type == "cuda":
        return not torch.are_deterministic_algorithms_enabled()
    return device.type == "cpu" and batch == 1


SEVERAL = 16  # tokens at once that loops may be asked for
LONGER = 256  # tokens: a cache has a multiple of them, so that a longer text finds room, too


class Aside:
    """What a model has for speed alone: no part of its structure, nor of its copies."""

    def __reduce__(self):
        return type(None), ()


class Last(Aside):
    """The memory of a text's cache and the step that was recorded there: for the next text, if
    nobody has that cache any more."""

    def __init__(self, cache: "RecordedCache"):
        self.cache, self.states = weakref.ref(cache), [vars(cache)]

    def again(self, size: int, like: Tensor, dtype: torch.dtype) -> "RecordedCache | None":
        """An empty cache of that memory, for `size` tokens where `like` is; None if it does not
        fit."""
        state = self.states.pop() if self.states and self.cache() is None else None
        k = state and state["k"]
        if k is None or k.size(1) > 1 or k.size(3) < size:
            return None
        if (k.dtype, k.device) != (dtype, like.device):
            return None
        if k.is_inference() != torch.is_inference_mode_enabled():
            return None
        cache = RecordedCache.__new__(RecordedCache)
        vars(cache).update(state)
        cache.clear()
        return cache


def structure(model: GPT) -> list:
    """What somebody may have changed between two texts: settings, parts, hooks, methods, weights in
    another place. Of all else, functions and numbers in their place, the next token tells."""

    def mark(value):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return id(value), value.data_ptr(), value.shape
        if isinstance(value, dict):
            return [(key, mark(v)) for key, v in value.items() if not isinstance(v, Aside)]
        return value if isinstance(value, (bool, int, float, str, nn.Module)) else id(value)

    parts = list(model.modules())
    kinds = {kind for part in parts for kind in type(part).__mro__ if kind is not object}
    found = [dict(vars(model.config)), *((kind, dict(vars(kind))) for kind in kinds)]
    return [*found, *map(dict, hooks(model)), *((type(part), mark(vars(part))) for part in parts)]


def hooks(model: GPT) -> list[dict]:
    """Of all modules, and of each, where a forward pass calls them."""
    everywhere = nn.modules.module
    found = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    return found + [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]


WORTH_KERNELS = 512  # tokens of a process after which these pay: to find them takes 0.2 to 7 s
WORTH_NUMBA = 8e9  # weights that steps have read after which it pays: to load it takes a second
PATIENCE = 16  # tokens without, on a CPU: recording takes as long as it saves in some twenty


# whether this process was, since this file was loaded: GNU's OpenMP ends one that uses it by numba
forked = False


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None


def note_fork() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)


class RecordedCache(KVCache):
    """A KV cache whose next token can be recorded once and replayed: on a GPU as a CUDA graph,
    since to start hundreds of kernels one by one takes longer than to run them; on a CPU, for one
    text, as a list of operations (engine/recording.py).

    Shapes and addresses are fixed: attention spans the whole cache, unless it is one operation that
    knows better, and where each row stands is a tensor on the device, `place`.
    """

    fixed = True
    loops = None  # on a CPU, the pass of engine/one_token_cpu.py, which then is `replay`
    recorded = None  # the buffers that the recording knows
    how = None  # `conditions` then
    structure = None  # that of the model then
    kernels = None  # on a GPU, those of engine/one_token.py, whose memory the recording knows
    inherited = False  # whether the recording is of another text, and was not compared yet
    running = False  # whether a step is computed, or recorded, at this moment
    waited = 0  # passes since a recording became possible
    fit = True  # whether Python decides nothing in a step
    written = 0  # tokens on a GPU, by all caches of this process
    read = 0  # weights, by passes on a CPU

    def __init__(self, config: GPTConfig, *more):
        super().__init__(config, *more)
        self.weights = config.parameters()

    def ready(self, T: int) -> bool:
        """Whether the next T tokens are worth, and can be, a recorded step: several where loops
        read them, or may do so, since nobody has looked yet."""
        if self.k.is_cuda:
            return T == 1
        if T < 1 or not records(self.k.device, len(self.lengths)):
            return False
        self.waited += 1
        RecordedCache.read += self.weights
        worth = self.fit and self.waited > PATIENCE and torch.is_inference_mode_enabled()
        if T == 1:
            return worth
        if self.recorded is self.k and self.how == self.conditions():
            return worth and self.loops is not None and self.loops.several >= T
        return worth and T <= SEVERAL and self.worth_joining()

    def conditions(self) -> tuple[int, bool]:
        """What a recording depends on, beside the model: threads, and whether it is joined."""
        return torch.get_num_threads(), self.worth_joining()

    def attends_one(self, mask: Tensor | None) -> bool:
        """Whether attention with that mask is one operation, that for one text on a CPU. Not if the
        mask is another than `begin` gave: it may hide more than what is not filled."""
        mine = self.running and mask is self.mask
        return mine and not mask.is_cuda and len(mask) == 1 and blas.keeps_to_one_thread()

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        if not self.running:
            return super().begin(T)
        self.end = self.k.size(3)
        self.at = self.place  # (B, 1)
        self.mask = (self.columns <= self.at[..., None])[:, None]  # (B, 1, 1, S)
        return self.at, self.mask

    def step(self, forward, tokens: Tensor) -> Tensor:
        """`forward` for the next tokens (B, T), several only of a single row: logits (B, T, V)."""
        T, longest, size = tokens.size(1), int(self.lengths.max()), self.k.size(3)
        if longest + T > size:
            raise ValueError(f"{longest + T} positions do not fit in a KV cache of {size}")
        how = self.conditions()
        changed = self.inherited and self.structure != structure(forward.__self__)
        if self.recorded is not self.k or self.how != how or changed:  # or `take` had other rows
            self.how, self.inherited = how, False
            self.record(forward, tokens[:, :1])
        if self.inherited and T > 1:
            self.replayed(forward, tokens[:, :1])  # the first alone tells whether it still serves
        if self.loops and not self.inherited:
            logits = self.loops.logits_of(tokens, longest)
        elif T > 1:  # none was found, and what is recorded is for one
            return forward(tokens, cache=self)
        else:
            logits = self.replayed(forward, tokens).clone()
        self.lengths += T
        if self.k.is_cuda:
            RecordedCache.written += 1
        return logits

    def replayed(self, forward, tokens: Tensor) -> Tensor:
        """Logits as they were recorded; what was inherited is compared with `forward` first, and
        recorded anew if that computes something else."""
        self.tokens.copy_(tokens)
        self.place.copy_(self.lengths[:, None])
        if not self.inherited:
            return self.compute(forward)
        true = self.run(forward)
        # behind it: on a GPU the cache then has what a text of its own would leave
        found = self.compute(forward)
        self.inherited = False
        if (found - true).norm() > self.rounding(bool(self.kernels)) * true.norm():
            self.record(forward, tokens)
            found = self.compute(forward)
        return found

    def compute(self, forward) -> Tensor:
        if self.replay:
            self.replay()
        else:
            self.logits = self.run(forward)
        return self.logits

    def rounding(self, kernels: bool) -> float:
        """How far logits may be apart, as a share, if model and recording compute the same; kernels
        of our own round numbers of 16 bits elsewhere."""
        if self.k.dtype == torch.float32:
            return 1e-3
        return 0.1 if kernels else 0.01

    def worth_joining(self) -> bool:
        """Whether this process writes so much that to look for a faster step pays."""
        if self.k.is_cuda:
            return RecordedCache.written >= WORTH_KERNELS
        return RecordedCache.read >= WORTH_NUMBA and has_numba() and not forked

    def clear(self) -> None:
        """For another text. Attention may span what is not filled, and 0 times inf is nan."""
        for memory in (self.k, self.v, self.past):
            memory.zero_()
        self.lengths = torch.zeros(1, dtype=torch.long)
        self.inherited = self.recorded is self.k and self.fit
        if not self.inherited:  # that text was too short, or Python had a part in it
            self.recorded, self.fit = None, True

    def rows(self, begin: int, end: int) -> KVCache:
        part = super().rows(begin, end)
        part.source = self  # so that no other text gets this memory meanwhile
        return part

    def record(self, forward, tokens: Tensor) -> None:
        model, device = forward.__self__, self.k.device
        self.recorded = self.replay = self.loops = None  # if it is interrupted
        self.tokens = tokens.clone()
        self.place = self.lengths[:, None].to(device, copy=True)
        self.columns = torch.arange(self.k.size(3), device=device)
        hooked = any(hooks(model))
        joins = self.how[1] and not hooked
        self.structure = structure(model)
        if device.type == "cuda":
            self.kernels = self.few_kernels(forward) if joins else None
            self.capture(self.kernels or forward)
            if self.kernels:
                self.kernels.model = None  # which may hold this memory for its next text
        elif hooked:  # which would not be called
            self.fit = False
        else:
            changing = [self.tokens, self.place, self.k, self.v, self.past]
            step = partial(self.run, forward)
            try:
                self.logits, self.replay = recording.record(step, changing, model.choice)
            except Exception:  # it cannot be recorded, or an operation is like no other
                self.fit = False
            if joins and self.fit:
                self.try_loops(forward)
        self.recorded = self.k

    def capture(self, forward) -> None:
        """A CUDA graph of a step."""
        with torch.cuda.device(self.k.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries set themselves up, which must not be recorded
                    self.run(forward)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self.logits = self.run(forward)
            self.replay = graph.replay

    def few_kernels(self, forward) -> Callable | None:
        """What computes a step in fewer kernels (engine/one_token.py), if it agrees with the book
        for this shape, and, roughly, with `forward` for this very token."""
        model = forward.__self__
        if not all(isinstance(block.attn, fast.FastAttention) for block in model.blocks):
            return None  # attention was changed
        try:
            from engine.one_token import OneToken, agrees

            with torch.cuda.device(self.k.device):
                step = OneToken(model, self)
                if agrees(model.config, self):
                    true, found = self.run(forward), self.run(step)
                    near = (found - true).norm() <= self.rounding(kernels=True) * true.norm()
                    return step if near else None
        except Exception:  # no Triton, a model or a shape that has no such kernels, no memory
            return None

    def try_loops(self, forward) -> None:
        """Takes loops that are compiled (engine/one_token_cpu.py), if numba is there, if they agree
        with `forward`, and are faster than what was recorded."""
        threads = torch.get_num_threads()
        try:
            from engine.one_token_cpu import step_of

            step = step_of(forward.__self__, forward, self)
        except Exception:  # no numba, or a cache of another kind
            step = None
        finally:
            torch.set_num_threads(threads)  # numba's OpenMP, which is torch's, begins with all
        if step:
            self.logits, self.replay, self.loops = step.logits, step, step
        else:
            self.replay()  # whose keys and values stay, and not those of a trial

    def run(self, forward) -> Tensor:
        lengths, self.running = self.lengths.clone(), True
        try:
            return forward(self.tokens, cache=self)
        finally:
            self.lengths.copy_(lengths)
            self.running = False

    def take(self, rows: list[int]) -> None:
        """In place if there are as many: the graph knows the addresses."""
        if len(rows) != len(self.lengths):
            return super().take(rows)
        end = int(self.lengths.max())
        self.k[:, :, :, :end] = self.k[:, rows, :, :end]
        self.v[:, :, :, :end] = self.v[:, rows, :, :end]
        self.past[:, :, : self.reach + end] = self.past[:, rows, : self.reach + end]
        self.lengths = self.lengths[rows]
