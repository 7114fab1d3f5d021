"""Sharding: each process keeps its rows of every matrix, their gradients and moments, and no more.

Where all processes hold the whole model, the largest model is what fits one of them. Here (FSDP2 of
torch, after ZeRO, arXiv:1910.02054) process r of W keeps the rows r n/W to (r+1) n/W of every
parameter. Before a block computes, forward and again backward, its rows are gathered from all, and
they are dropped behind it; its gradients are summed and scattered as soon as they are there. So one
block is whole at a time, and beside it what is no block: embeddings, head, the objective's heads.
All passes of an update communicate: to save that, gradients would have to be kept whole.

    layer        rank 0       rank 1                  rank 0 and 1, while the layer computes
    W (4, C)     W[0:2]       W[2:4]      gather -->  W[0:4]
    dL/dW        sum [0:2]    sum [2:4]   <-- scatter dL/dW[0:4], of its own windows

What an optimizer does number by number it does to its rows. Muon wants whole matrices: see below.
A checkpoint is the same file as ever, and goes through the first process row by row.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from engine.machine import Machine
from model import GPT, Block, new_block
from optim import Muon
from shape import GPTConfig


@lru_cache
def mesh(kind: str):
    return init_device_mesh(kind, (dist.get_world_size(),))


@torch.no_grad()
def shard(module: nn.Module, here: Machine, dtype: torch.dtype | None) -> None:
    """Leaves of `module` the rows of this process, on its device; gathers them in type `dtype`.

    Of weights that are mapped from a file only these rows are read.
    """
    whole = {}
    for name, p in module.named_parameters():
        if not isinstance(p, DTensor):
            owner, _, key = name.rpartition(".")
            whole[name] = p
            empty = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            module.get_submodule(owner)._parameters[key] = empty
    # autocast would keep a copy of each matrix in 16 bits until the backward pass, and so the whole
    # model. Gathered in 16 bits there is nothing to copy, and half as much to send
    types = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh(here.device.type), mp_policy=types)
    module.set_gradient_divide_factor(1.0)  # the loss is divided already: a sum, and no mean
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    module._apply(lambda t: torch.empty_like(t, device=here.device) if t.is_meta else t)
    for name, p in module.named_parameters():
        if name in whole:
            p.to_local().copy_(whole[name][slice(*span(p.size(0)))])


def shard_blocks(module: nn.Module, here: Machine) -> None:
    dtype = None if here.dtype == torch.float32 else here.dtype
    for block in module.modules():
        if isinstance(block, Block) and not isinstance(block, FSDPModule):
            shard(block, here, dtype)


def shard_learner(learner: nn.Module, here: Machine) -> None:
    """Shards blocks, and what is left, which stays whole during a pass."""
    shard_blocks(learner, here)
    shard(learner, here, None)
    register_fsdp_forward_method(learner, "sums")
    sums = learner.sums

    def sums_and_reshard(*inputs) -> list[float]:
        with torch.compiler.set_stance("force_eager"):  # each block is compiled by itself
            found = sums(*inputs)
        learner.reshard()  # no backward pass does
        return found

    learner.sums = sums_and_reshard


def describe(learner: nn.Module) -> str:
    """What one process keeps, the first, which never has less than another."""
    mine, every = (
        sum(16 * size(p) for p in learner.parameters() if p.requires_grad)
        for size in (lambda p: p.to_local().numel(), lambda p: p.numel())
    )
    kept = f"{mine / 1e6:,.1f} of {every / 1e6:,.1f} MB of weights, gradients and moments"
    return f"sharded: each process keeps up to {kept}; sample.py, with all, writes samples"


def new_model(config: GPTConfig, seed: int, here: Machine) -> GPT:
    """As GPT(config) with init_weights(seed), of which one block at a time is whole."""
    outside = copy.copy(config)
    outside.n_layer = 0
    gpt = GPT(outside)
    gpt.config = config
    gpt.here = here
    gpt.__class__ = BlockByBlock
    gpt.init_weights(seed)
    gpt.__class__ = GPT
    del gpt.here
    return gpt


class BlockByBlock(GPT):
    """Without blocks at first: each is made when `init_weights` comes to it, and sharded behind."""

    def modules(self) -> Iterator[nn.Module]:
        yield self
        for child in self.children():
            if child is not self.blocks:
                yield from child.modules()
                continue
            for layer in range(self.config.n_layer):
                block = new_block(self.config, layer)
                yield from block.modules()
                shard_blocks(block, self.here)
                self.blocks.append(block)


# --- rows of a tensor, to and from files that hold it whole


def span(rows: int, rank: int | None = None) -> tuple[int, int]:
    """The first row of a process, by default of this one, and that behind its last."""
    rank = dist.get_rank() if rank is None else rank
    most = -(-rows // dist.get_world_size())
    return min(rank * most, rows), min((rank + 1) * most, rows)


def whole_in_pieces(tensor: DTensor) -> Iterator[Tensor]:
    """To the first process all rows of a sharded tensor, as many at once as a process has; to the
    others, who have to ask as well, nothing."""
    local, rank = tensor.to_local().detach(), dist.get_rank()
    if rank == 0:
        yield local
    elif local.numel():
        dist.send(local.contiguous(), 0)
    for other in range(1, dist.get_world_size() if rank == 0 else 1):
        first, end = span(tensor.size(0), other)
        if end > first:
            piece = local.new_empty(end - first, *tensor.shape[1:])
            dist.recv(piece, other)
            yield piece


def rows_of(whole: Tensor, p: DTensor) -> DTensor:
    """Of `whole`, in a file, those rows that this process has of `p`."""
    return of_rows(whole[slice(*span(p.size(0)))].to(p.device, copy=True), p)


def of_rows(local: Tensor, p: DTensor) -> DTensor:
    """The tensor in the shape of `p` of which this process has the rows `local`."""
    shape = dict(shape=p.shape, stride=p.stride())
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, **shape)


# --- Muon


class ShardedMuon(Muon):
    """Orthogonalises whole matrices, each in one process, which all have about as many."""

    def directions(self, ahead: list[DTensor]) -> list[DTensor]:
        rank, world = dist.get_rank(), dist.get_world_size()
        rows, columns = ahead[0].shape
        sizes = [end - first for first, end in (span(rows, r) for r in range(world))]
        mine = range(rank, len(ahead), world)  # the matrices that this process makes orthogonal
        shares = [len(range(r, len(ahead), world)) for r in range(world)]
        # 1. to each process this one's rows of its matrices, and from each its rows of mine
        parts = [p.to_local().flatten() for r in range(world) for p in ahead[r::world]]
        give = [n * sizes[rank] * columns for n in shares]
        take = [len(mine) * n * columns for n in sizes]
        got = exchange(torch.cat(parts), give, take)
        # 2. side by side, whole: (matrices, rows, columns)
        got = [z.view(len(mine), n, columns) for z, n in zip(got.split(take), sizes, strict=True)]
        whole = torch.cat(got, dim=1)
        if len(mine):
            whole = super().directions([*whole])
            whole = torch.stack(whole)
        # 3. and back
        back = torch.cat([z.flatten() for z in whole.split(sizes, dim=1)])
        got = exchange(back, take, give).split([sizes[rank] * columns] * len(ahead))
        order = [i for r in range(world) for i in range(r, len(ahead), world)]
        found = dict(zip(order, got, strict=True))
        views = (found[i].view(-1, columns) for i in range(len(ahead)))
        return [of_rows(z, p) for z, p in zip(views, ahead, strict=True)]


def exchange(flat: Tensor, give: list[int], take: list[int]) -> Tensor:
    """Sends to each process its next `give` numbers of `flat`, and takes as many from each."""
    got = flat.new_empty(sum(take))
    dist.all_to_all_single(got, flat, take, give)
    return got


def share_work(optimizers: list) -> None:
    for optimizer in optimizers:
        if type(optimizer) is Muon:
            optimizer.__class__ = ShardedMuon
