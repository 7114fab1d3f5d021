"""The Transformer: settings, rotary positions, KV cache, attention, MLP, block, GPT.

Only mathematics: no files, no printing, no globals.

One class covers three published shapes, chosen by `GPTConfig`:

    GPT-2          learned positions, LayerNorm, GELU, biases, tied head (Radford et al. 2019)
    modern         rotary, RMSNorm, query/key norm, ReLU^2, capped logits (karpathy/nanochat)
    Llama and kin  rotary, RMSNorm with weights, SwiGLU, grouped heads: Llama (arXiv:2302.13971),
                   Mistral, Qwen2 with qkv_bias, Qwen3 with qk_norm (arXiv:2505.09388)

Shapes in comments: B batch, T time (positions in this call), S positions attended to, C channels
(n_embd), H heads, K key/value heads, D channels of a head, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shape import GPTConfig

IGNORE = -100  # a target that does not count: cross_entropy's own convention


class RMSNormalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, with the gradient written out.

    On a CPU, F.rms_norm is a chain of small kernels, and so is its gradient: twice the time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.size(-1) + eps).rsqrt().to(x.dtype)  # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        y, scale = ctx.saved_tensors
        along = (g * y).mean(dim=-1, keepdim=True)  # moving x along itself changes nothing
        return torch.addcmul(g, y, along, value=-1) * scale, None


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension."""

    def __init__(self, dim: int, config: GPTConfig):
        super().__init__()
        self.layer, self.eps, self.shape = config.norm == "layer", config.norm_eps, (dim,)
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_weight else None
        shift = self.layer and config.bias
        self.bias = nn.Parameter(torch.zeros(dim)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        if x.device.type != "cpu":
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        x = RMSNormalise.apply(x, self.eps)
        return x if self.weight is None else x * self.weight


def rotary_table(
    length: int, dim: int, base: float, factor: float = 1.0, original: int = 0
) -> Tensor:
    """Cosines and sines of position * base^(-2i/dim): (2, length, dim). arXiv:2104.09864.

    With a `factor`, waves longer than the `original` context, in which they never turned once, are
    stretched by it; those that turned four times or more stay; between, a mixture of both. Llama
    3.1: models/llama3/reference_impl/model.py of github.com/meta-llama/llama-models.
    """
    # in this very form, rounded as in transformers: far out, an ulp of it is a different angle
    frequency = 1.0 / base ** (torch.arange(0, dim, 2, device="cpu", dtype=torch.float32) / dim)
    if factor != 1:
        turns = original / (2 * math.pi / frequency)  # (dim/2,), of each pair in that context
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequency = (1 - keep) * frequency / factor + keep * frequency
    angle = torch.outer(torch.arange(length, device="cpu", dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()  # (length, dim/2)
    # channels i and i + dim/2 turn together: Llama's layout; the sign is that of the other channel
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns each pair of channels of x (B, T, H, D) by its position's angle; rope is (2, T, D)."""
    cos, sin = rope.to(x.dtype).unsqueeze(2)  # (T, 1, D)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin  # roll swaps the halves


class KVCache:
    """Keys and values of all positions so far, preallocated for `size` (0: the whole context).

    `length` counts the positions stored. Writing past the end raises ValueError: see `generate` in
    generate.py for what to do then. `at` is for inference.RecordedStep: the position of the one new
    token, as a tensor (1,).
    """

    def __init__(self, config: GPTConfig, batch: int, device=None, dtype=torch.float32, size=0):
        size = size or config.block_size
        shape = (config.n_layer, batch, config.n_kv_head, size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.at = 0, None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, K, T, D) of one layer and returns all of its k and v (B, K, S, D)."""
        end = self.length + k.size(2)
        if end > self.k.size(3):
            raise ValueError(f"{end} positions do not fit in a KV cache of {self.k.size(3)}")
        if self.at is not None:
            self.k[layer][:, :, self.at] = k.to(self.k.dtype)
            self.v[layer][:, :, self.at] = v.to(self.v.dtype)
            return self.k[layer], self.v[layer]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def expand(self, batch: int) -> None:
        """One stored sequence becomes `batch` equal ones: one prefill serves many samples."""
        self.k = self.k.repeat(1, batch, 1, 1, 1)
        self.v = self.v.repeat(1, batch, 1, 1, 1)


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762) with grouped key/value heads (arXiv:2305.13245)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        bias = c.bias or c.qkv_bias
        self.wq = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=bias)
        self.wk = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=bias)
        self.wv = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=bias)
        self.wo = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.q_norm = Norm(c.head_dim, c) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(c.head_dim, c) if c.qk_norm else nn.Identity()
        self.ready_qkv = None  # one layer instead of three, that inference.ready has made

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of queries, keys and values: one product is faster than three."""
        linears = (self.wq, self.wk, self.wv)
        bias = None if self.wq.bias is None else torch.cat([w.bias for w in linears])
        return torch.cat([w.weight for w in linears]), bias

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: KVCache | None):
        B, T, _ = x.shape
        D = self.config.head_dim
        H, K = self.config.n_head, self.config.n_kv_head
        qkv = self.ready_qkv(x) if self.ready_qkv else F.linear(x, *self.joined())
        q, k, v = qkv.view(B, T, -1, D).split([H, K, K], dim=2)
        q, k = self.q_norm(q), self.k_norm(k)  # (B, T, H, D), (B, T, K, D)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        y = attend(q.to(k.dtype), k, v, mask, self.config.dropout * self.training)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, K, S, D): (B, H, T, D)."""
    (B, H, T, D), K, S = q.shape, k.size(1), k.size(2)
    if q.device.type == "cpu" and mask is None and 1 < T == S <= 512 and not dropout:
        # short contexts on a CPU: the fused kernel's bfloat16 gradient takes 2 to 7 times as long
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        q, k, v = (z.reshape(B * H, T, D) for z in (q, k, v))
        future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        score = torch.baddbmm(future, q, k.mT, alpha=D**-0.5)  # (B*H, T, T)
        return (score.softmax(dim=-1) @ v).view(B, H, T, D)
    if T == 1:  # the heads that share keys become the rows of one product
        q = q.reshape(B, K, H // K, D)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,  # a single new position may look at all before it
        dropout_p=dropout,
        enable_gqa=q.size(1) != K,
    )
    return y.reshape(B, H, T, D)


class MLP(nn.Module):
    """The position-wise network: GELU as in GPT-2 (tanh form), ReLU^2 (arXiv:2109.08668), or
    SwiGLU (arXiv:2002.05202), which multiplies by a gate."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias)
        self.down = nn.Linear(config.mlp_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, mlp_dim)
        if self.kind == "swiglu":
            h = F.silu(self.gate(x)) * h
        elif self.kind == "gelu":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.relu(h).square()
        return self.down(h)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn_norm = Norm(config.n_embd, config)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: KVCache | None):
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, cache))
        x = x + self.drop(self.mlp(self.mlp_norm(x)))
        return x


def embedding(rows: int, dim: int) -> nn.Embedding:
    """Zeros until init_weights draws: drawing on "meta" would import torch's compiler, a second."""
    return nn.Embedding.from_pretrained(torch.zeros(rows, dim), freeze=False)


class GPT(nn.Module):
    """The whole model. Call `init_weights`, or load weights, before using it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = embedding(config.block_size, config.n_embd)
        else:
            c = config
            table = rotary_table(
                c.block_size, c.head_dim, c.rope_base, c.rope_factor, c.rope_original
            )
            self.register_buffer("rope", table, persistent=False)  # computed, never stored
        self.embed_norm = Norm(config.n_embd, config) if config.embed_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config.n_embd, config)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.ready_head = None  # the head that inference.ready has made

    @torch.no_grad()
    def init_weights(self, seed: int, zero_init: bool | None = None) -> None:
        """Draws all weights anew, a function of `seed` alone.

        With `zero_init` the residual projections and an untied head start at zero, so each block
        begins as the identity and the loss as ln V exactly (arXiv:2203.03466); without it, GPT-2's
        scheme: N(0, 0.02), residual projections smaller by sqrt(2 n_layer).
        """
        zero_init = self.config.zero_init if zero_init is None else zero_init
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("wo.weight", "down.weight", "head.weight")) and zero_init:
                p.zero_()
            elif not zero_init:
                residual = name.endswith(("wo.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=g))
            elif name in ("wte.weight", "wpe.weight"):
                # a norm follows an untied embedding, so its scale sets only how fast it learns
                std = 1.0 if self.config.embed_norm and not self.config.tied else 0.02
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=g))
            else:
                bound = math.sqrt(3 / p.size(1))  # uniform with variance 1 / fan_in
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=g))

    def set_context(self, block_size: int, dropout: float) -> None:
        """Sets the longest context and the dropout rate, keeping the weights.

        Raises ValueError for more positions than were learned; rotary ones go on without end.
        """
        c = self.config
        if c.position == "learned":
            if block_size > c.block_size:
                raise ValueError(
                    f"block_size={block_size} exceeds the {c.block_size} positions that the model"
                    f" has learned: use --block_size={c.block_size} or less"
                )
            self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size].clone(), False)
        else:
            self.rope = rotary_table(
                block_size, c.head_dim, c.rope_base, c.rope_factor, c.rope_original
            )
        c.block_size, c.dropout = block_size, dropout
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def trunk(
        self, tokens: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """All but the head: tokens (B, T) to the final hidden states (B, T, C).

        `mask` is the attention policy: None is causal; a boolean (T, S) or (B, 1, T, S) is True
        where a position may look, all ones for an encoder. With a `cache`, `tokens` continue what
        it holds, and are appended to it.
        """
        T, start = tokens.size(1), cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens exceed block_size={self.config.block_size}")
        if mask is None and start and T > 1:  # several new positions behind stored ones
            mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)
        at = cache.at if cache and cache.at is not None else slice(start, start + T)
        x, rope = self.wte(tokens), None  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.wpe.weight[at]
        else:
            rope = self.rope[:, at]
        device = x.device.type
        if torch.is_autocast_enabled(device):  # the residual stream in the products' type: no casts
            x = x.to(torch.get_autocast_dtype(device))
        x = self.drop(self.embed_norm(x))
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: hidden states (..., C) to float32 logits (..., V)."""
        V, cap = self.config.vocab_size, self.config.logit_cap
        if self.ready_head is not None:
            logits = self.ready_head(x).float()
        else:
            weight = self.wte.weight if self.config.tied else self.head.weight  # (V, C)
            if x.is_cuda and x.size(-2) > 1:  # tensor cores want a multiple of 64
                weight = F.pad(weight, (0, 0, 0, -V % 64))  # zero rows: cut off, never stored
            logits = F.linear(x, weight)[..., :V].float()
        # cap * tanh(logits / cap), but tanh is several times slower than sigmoid on a CPU
        return 2 * cap * torch.sigmoid(logits * (2 / cap)) - cap if cap else logits

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with `targets` (B, T) the cross-entropy in nats, mean or sum.

        Targets of -100 do not count. With a `cache`, only the last position's logits: (B, 1, V).
        """
        x = self.trunk(tokens, mask, cache)
        logits = self.logits(x if cache is None else x[:, -1:])
        if targets is None:
            return logits
        flat = logits.view(-1, logits.size(-1))
        return F.cross_entropy(flat, targets.view(-1), ignore_index=IGNORE, reduction=reduction)

    def new_cache(self, batch: int = 1, size: int = 0) -> KVCache:
        """An empty KV cache for `batch` sequences of up to `size` tokens (0: the whole context)."""
        weight = self.wte.weight
        # on a CPU attention in float32 is several times faster, its part of memory traffic small
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        return KVCache(self.config, batch, weight.device, dtype, size)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
