"""A model made ready to generate: faster linear layers, eight-bit weights, recorded steps.

One token at a time, a model is a chain of matrix-vector products, and each reads all of its weights
from memory to use them once. So what counts is how fast the weights are read, and how many bytes
they have. docs/speed.md has the figures.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, KVCache

FEW = 16  # rows for which eight-bit weights are used as they are


def ready(model: GPT, quantize: str = "", rows: int = 1) -> GPT:
    """Replaces the linear layers of `model`, in place, by ones that are faster for `rows` rows.

    With `quantize="int8"` by ones with weights of eight bits. They serve generation and evaluation,
    not training. On a GPU only queries, keys and values are joined, and int8 raises ValueError.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if quantize and not on_cpu:
        raise ValueError(f"quantize={quantize!r} works with device=cpu only")
    if not on_cpu:
        kind = plain_linear
    elif quantize or rows == 1 or not torch.backends.mkldnn.is_available():
        kind = partial(StreamedLinear, quantize=quantize)
    else:
        kind = PackedLinear
    for block in model.blocks:
        block.attn.ready_qkv = kind(*block.attn.joined())
        del block.attn.wq, block.attn.wk, block.attn.wv
        for part in (block.attn, block.mlp) if on_cpu else ():
            for name, layer in part.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(part, name, kind(layer.weight, layer.bias))
    model.ready_head = kind(model.wte.weight if model.config.tied else model.head.weight, None)
    return model


def plain_linear(weight: Tensor, bias: Tensor | None) -> partial:
    return partial(F.linear, weight=weight, bias=bias)


class StreamedLinear(nn.Module):
    """x W^T + b for one row x, at the speed of memory; with `quantize`, W has eight bits.

    The product is a sum of the rows of W^T, weighted by x: what recommendation systems call an
    embedding bag. torch has one that reads rows in sequence as fast as memory gives them, and one
    for rows of eight bits with a scale and an offset each. W^T is cut into blocks of columns, a bag
    for each, so that the cores share the work.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantize: str = ""):
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.eight_bits, self.width = bool(quantize), 128 if quantize else 256
        self.blocks = -(-self.outputs // self.width)
        whole = F.pad(weight.detach(), (0, 0, 0, -self.outputs % self.width))
        rows = whole.view(self.blocks, self.width, self.inputs).mT.reshape(-1, self.width)
        if quantize:
            rows = torch.ops.quantized.embedding_bag_byte_prepack(rows.float())
        index = torch.arange(len(rows), dtype=torch.int32)
        self.rows, self.index = rows, index.view(self.blocks, 1, self.inputs)
        self.begins = torch.arange(self.blocks * FEW, dtype=torch.int32) * self.inputs
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
        if n > (FEW if self.eight_bits else 1):
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        # a block for all rows of x before the next: it is in the cache from the second row on
        index = self.index.expand(-1, n, -1).reshape(-1)
        x_ = x.view(n, self.inputs).expand(self.blocks, n, self.inputs).reshape(-1)
        begins = self.begins[: self.blocks * n]
        if self.eight_bits:
            bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
            y = bag(self.rows, index, begins, per_sample_weights=x_.float())
        else:
            y = torch.embedding_bag(self.rows, index, begins, False, 0, False, x_)[0]
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


class RecordedStep:
    """The next logits (B, V) for one new token in each row of `cache`, recorded as a CUDA graph.

    A replay starts hundreds of kernels at once, which one by one take longer to start than to run.
    Its shapes and addresses are fixed: attention spans the whole cache, and a mask hides what is
    not there yet. Elsewhere than on a GPU nothing is recorded, and the result is the same.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, None
        device, rows, length = cache.k.device, cache.k.size(1), cache.k.size(3)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.at = torch.full((1,), cache.length, device=device)
        self.positions = torch.arange(length, device=device)
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()  # the first runs, which allocate, must not be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
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
