"""A model made ready to generate: faster linear layers, eight-bit weights, recorded steps.

One token at a time, a model is a chain of matrix-vector products, and each reads all of its weights
from memory to use them once. So what counts is how fast the weights are read, and how many bytes
they have. docs/speed.md has the figures.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.machine import fast_bfloat16
from model import GPT, KVCache

FEW = 16  # rows up to which eight-bit weights are used as they are; for more, unpacking pays
WIDTH = {"": 256, "int8": 128}  # columns of a block: wider reads faster, narrower is more exact


@torch.no_grad()
def ready(model: GPT, quantize: str = "", rows: int = 1) -> GPT:
    """Replaces the linear layers of `model`, in place, by ones that are faster for `rows` rows.

    With `quantize="int8"` by ones with weights of eight bits. The model can then generate and be
    evaluated, but neither learn nor be saved nor moved. On a GPU queries, keys and values become
    one layer, and that is all; int8 raises ValueError there.
    """
    like = next(model.parameters())
    on_cpu = like.device.type == "cpu"
    if quantize and not on_cpu:
        raise ValueError(f"quantize={quantize!r} works with device=cpu only")
    if quantize or (on_cpu and rows == 1):
        kind = partial(StreamedLinear, quantize=quantize)
    elif on_cpu and packable(like.dtype):
        kind = PackedLinear
    else:
        kind = plain_linear
    for block in model.blocks:
        block.attn.ready_qkv = kind(*block.attn.joined())
        del block.attn.wq, block.attn.wk, block.attn.wv
        for part in () if kind is plain_linear else (block.attn, block.mlp):
            for name, layer in part.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(part, name, kind(layer.weight, layer.bias))
    model.ready_head = kind(model.wte.weight if model.config.tied else model.head.weight, None)
    if not model.config.tied:
        del model.head
    return model


def packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and this processor has what it needs for the type."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def plain_linear(weight: Tensor, bias: Tensor | None) -> partial:
    return partial(F.linear, weight=weight, bias=bias)


class StreamedLinear(nn.Module):
    """x W^T + b for one row x, at the speed of memory; with `quantize`, W has eight bits, and up to
    FEW rows are read that way.

    The product is a sum of the rows of W^T, weighted by x: what recommendation systems call an
    embedding bag. torch has one that reads rows in sequence as fast as memory gives them, and one
    for rows of eight bits with a scale and an offset each. W^T is cut into blocks of columns, a bag
    for each, so that the cores share the work.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantize: str = ""):
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.width, self.few = WIDTH[quantize], FEW if quantize else 1
        self.eight_bits = bool(quantize)
        self.blocks = -(-self.outputs // self.width)
        whole = F.pad(weight.detach(), (0, 0, 0, -self.outputs % self.width))
        rows = whole.view(self.blocks, self.width, self.inputs).mT.reshape(-1, self.width)
        if quantize:
            rows = torch.ops.quantized.embedding_bag_byte_prepack(rows.float())
        index = torch.arange(len(rows), dtype=torch.int32)
        self.rows, self.index = rows, index.view(self.blocks, 1, self.inputs)
        self.begins = torch.arange(self.blocks * self.few, dtype=torch.int32) * self.inputs
        self.bias = None if bias is None else bias.detach()

    @property
    def weight(self) -> Tensor:
        """The weights in the usual layout, (outputs, inputs)."""
        rows = self.rows
        if self.eight_bits:
            rows = torch.ops.quantized.embedding_bag_byte_unpack(rows)
        return rows.view(self.blocks, self.inputs, self.width).mT.flatten(0, 1)[: self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // self.inputs
        if n > self.few:
            if x.dtype == torch.bfloat16 and not fast_bfloat16():  # emulated, it would take minutes
                y = F.linear(x.float(), self.weight.float()).to(x.dtype)
                return y if self.bias is None else y + self.bias
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        # a block for all rows of x before the next: it is in the cache from the second row on
        index = self.index.expand(-1, n, -1).reshape(-1)
        factors = x.reshape(n, self.inputs).expand(self.blocks, n, self.inputs).reshape(-1)
        begins = self.begins[: self.blocks * n]
        if self.eight_bits:
            bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
            y = bag(self.rows, index, begins, per_sample_weights=factors.float())
        else:
            y = torch.embedding_bag(self.rows, index, begins, False, 0, False, factors)[0]
        y = y.view(self.blocks, n, self.width).transpose(0, 1).reshape(n, -1)[:, : self.outputs]
        y = y.to(x.dtype).view(*x.shape[:-1], self.outputs)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """x W^T + b for several rows, with W in the layout that oneDNN likes best, once and for all.

    torch's compiler uses the same two operations for constant weights on a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def records(device: torch.device) -> bool:
    return device.type == "cuda"


class RecordedStep:
    """The next logits (B, V) for one new token in each row of `cache`, recorded as a CUDA graph.

    A replay starts hundreds of kernels at once, which one by one take longer to start than to run.
    Its shapes and addresses are fixed: `cache` must have its final batch size, attention spans all
    of it, and a mask hides what is not there yet. A result is valid until the next call. Elsewhere
    than on a GPU nothing is recorded, and the result is the same.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, None
        device, rows, size = cache.k.device, cache.k.size(1), cache.k.size(3)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.at = torch.full((1,), cache.length, device=device)
        self.positions = torch.arange(size, device=device)
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries set themselves up, which must not be recorded
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.logits = self.run()

    def run(self) -> Tensor:
        length, self.cache.at = self.cache.length, self.at
        mask = (self.positions <= self.at)[None]  # (1, S)
        logits = self.model(self.tokens, mask=mask, cache=self.cache)[:, -1]
        self.cache.length, self.cache.at = length, None
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.at.fill_(self.cache.length)
        if self.graph:
            self.graph.replay()
        else:
            self.logits = self.run()
        self.cache.length += 1
        return self.logits
