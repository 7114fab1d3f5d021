"""Operations of a CPU, recorded while a function runs, and replayed without the function.

One token passes through hundreds of small operations. What Python, modules, views and memory for
results cost beside them is a fifth of the time and more, and threads that wait for work meanwhile
fall asleep. A GPU has CUDA graphs for that; this is the same idea: if all tensors stay where they
are, a list of operations can be run again. docs/speed.md has the figures.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import blas
from engine.again import by_numpy
from engine.threads import AllOrOne

Tag = torch.Tag
WEIGHTS = 1 << 19  # numbers of a matrix for whose product another thread is worth waking
LARGE = 1 << 21  # and of what else an operation reads: of all of a long text's keys, say
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # no dropout here
# operations for which no other thread of torch is woken
ALONE = {torch.ops.aten.embedding.default}  # it reads a row of a matrix and not all of it
ALONE |= blas.AGAIN.keys()  # with threads of their own
COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd  # made of other operations
UNFIT = {Tag.data_dependent_output, Tag.dynamic_output_shape, Tag.nondeterministic_seeded}
UNFIT |= {Tag.inplace_view}  # another shape for a tensor that is known
LIFT, DETACH = torch.ops.aten.lift_fresh.default, torch.ops.aten.detach_.default
FIT = {ATTENTION, DETACH}  # in spite of their tags


def record(
    function: Callable[[], Tensor], inputs: list[Tensor], choice: AllOrOne | None = None
) -> tuple[Tensor, Callable]:
    """The result of `function`, and what computes it anew, into the same tensor, from what the
    tensors `inputs` hold then, which `function` may change; all else it takes to be constant.

    Large products get all threads of this moment, all else one; beside a busy process they get one
    as well, if `choice`, which may know of earlier recordings, finds that faster. Raises ValueError
    where numbers in tensors decide what is done next: Python is not recorded.
    """
    with Recorder() as recorder:
        result = function()
    return result, recorder.program(inputs, result, choice or AllOrOne())


class Recorder(TorchDispatchMode):
    """Notes each operation and its tensors. What is computed twice from the same, once a layer
    say, is computed once."""

    def __init__(self):
        super().__init__()
        self.done: list[tuple] = []  # (operation, arguments, named ones, what it reads, results)
        self.known: dict[tuple, tuple] = {}
        self.shared: set[int] = set()  # storages of results that were given out twice, or made once
        self.changes: Counter[int] = Counter()  # of each storage, in place

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler, which takes a second

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        composed, changes = kind(operation)
        if composed:
            with self:
                return operation._op_dk(COMPOSED, *args, **kwargs)
        leaves = [*flat(args), *kwargs, *flat(kwargs.values())]
        read = tensors(leaves)
        same = operation, *map(self.key, leaves)
        if not changes and same in self.known:
            result, made = self.known[same]
            if not any(self.changes[storage(r)] for r in made):
                self.shared.update(map(storage, made))
                return result
        result = operation(*args, **kwargs)
        made = tensors(flat([result]))
        if changes and not made:  # what changes lists of tensors gives nothing back
            known = zip(args, operation._schema.arguments, strict=False)
            made = tensors(flat([arg for arg, told in known if told.alias_info is not None]))
        if changes:
            self.changes.update(map(storage, made))
            if self.shared.intersection(map(storage, made)):
                raise ValueError(f"{operation} changes what others read")
        else:
            self.known[same] = result, made
            if operation == LIFT:  # by torch.tensor(...), which no replay calls
                self.shared.update(map(storage, made))
        self.done.append((operation, args, kwargs, read, made))
        return result

    def key(self, leaf):
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return type(leaf), leaf if leaf.__hash__ else id(leaf)
        where = storage(leaf), leaf.storage_offset(), leaf.shape, leaf.stride(), leaf.dtype
        return *where, self.changes[where[0]]

    def program(self, inputs: list[Tensor], result: Tensor, choice: AllOrOne) -> Callable:
        """What runs those operations again that depend on `inputs`."""
        varies, before = {*map(storage, inputs)}, 0
        done = [(*step, {*map(storage, step[3])}, {*map(storage, step[4])}) for step in self.done]
        while before != (before := len(varies)):  # what is changed in place is made anew first
            for *_, sources, targets in done:
                if not (varies.isdisjoint(sources) and varies.isdisjoint(targets)):
                    varies |= targets
        varies.discard(0)  # of nothing, or of a layout of oneDNN's
        needed, kept, threads = {storage(result)}, [], torch.get_num_threads()
        for operation, args, kwargs, read, made, sources, targets in reversed(done):
            constant = varies.isdisjoint(sources | targets)
            view = targets <= sources
            unread = not operation._schema.is_mutable and (view or needed.isdisjoint(targets))
            if constant or unread:
                continue
            wide = operation not in ALONE and large(args, read, varies)
            kept.append((again(operation, args, kwargs, made, needed, wide), wide))
            needed |= sources
        alone = [step for step, _ in reversed(kept)]
        together = [several(step, threads) if wide else [step] for step, wide in reversed(kept)]
        together = [part for steps in together for part in steps]
        of_numpy = any(step[0] is blas.GEMV for step in done)

        @blas.quiet
        def replay() -> Tensor:
            all_threads = threads > 1 and choice.together()
            start = time.perf_counter()
            torch.set_num_threads(1)
            try:
                with blas.one_thread(not (all_threads and of_numpy)):
                    for function, args, kwargs in together if all_threads else alone:
                        function(*args, **kwargs)
            finally:
                torch.set_num_threads(threads)
            if threads > 1:
                choice.took(all_threads, time.perf_counter() - start)
            return result

        return replay


def large(args, read: list[Tensor], varies: set[int]) -> bool:
    """Whether an operation is worth more than one thread: to wake it takes about 100 microseconds,
    in which one alone reads a million numbers."""
    packed = any(isinstance(value, torch.ScriptObject) for value in args)
    return packed or any(t.numel() >= (LARGE if storage(t) in varies else WEIGHTS) for t in read)


def several(step: tuple, threads: int) -> list[tuple]:
    return [(torch.set_num_threads, (threads,), {}), step, (torch.set_num_threads, (1,), {})]


@cache
def kind(operation) -> tuple[bool, bool]:
    """Whether an operation is made of others, and whether it changes a tensor. Raises ValueError
    for one whose results may differ for reasons that are not recorded."""
    if operation.has_kernel_for_dispatch_key(COMPOSED):
        return True, False
    if UNFIT & set(operation.tags) and operation not in FIT:
        raise ValueError(f"{operation} cannot be recorded")
    return False, operation._schema.is_mutable and operation != DETACH  # changes no number


def flat(values) -> list:
    """Values, and in the place of a list or tuple its own, and where it ends."""
    leaves = []
    for value in values:
        leaves += [*flat(value), list] if isinstance(value, list | tuple) else [value]
    return leaves


def tensors(leaves: list) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def storage(t: Tensor) -> int:
    """The address of its memory; those of oneDNN's own layout, all constant, do not tell it."""
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else 0


def again(operation, args, kwargs, made: list[Tensor], needed: set[int], wide: bool) -> tuple:
    """(function, arguments, named ones) that computes `made` once more, where they are, if they
    are `needed`; what is `wide`, with several threads maybe, by torch."""
    if operation in blas.AGAIN:
        return blas.AGAIN[operation](*args, *made), (), {}
    only_first = bool(made) and needed.isdisjoint(map(storage, made[1:]))
    if only_first and not wide and (step := by_numpy(operation, args, kwargs, made[0])):
        return step
    if operation._schema.is_mutable:
        return operation, args, kwargs
    there = into(operation)
    if there:
        return there[0], args, kwargs | dict(zip(there[1], made, strict=True))
    wanted = [storage(t) in needed for t in made]

    def computed(*args, **kwargs) -> None:
        results = operation(*args, **kwargs)
        results = [results] if isinstance(results, Tensor) else results
        for old, new, want in zip(made, results, wanted, strict=True):
            if want:
                old.copy_(new)

    return computed, args, kwargs


@cache
def into(operation) -> tuple | None:
    """The form of an operation that writes into given tensors, and their names, if it has one that
    is not made of the other form and a copy."""

    def signature(op):
        return [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]

    packet = operation.overloadpacket
    for other in (getattr(packet, name) for name in packet.overloads()):
        names = [a.name for a in other._schema.arguments if a.is_out]
        if names and Tag.generated not in other.tags and signature(other) == signature(operation):
            return other, names
    return None
