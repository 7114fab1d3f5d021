"""The Transformer: tokens in, a score for every possible next token out.

    tokens ─> embedding ─> block ─> ... ─> block ─> norm ─> head ─> logits ─> loss
                             │
                 x = x + attention(norm(x))     look at the tokens before
                 x = x + mlp(norm(x))           think about what was found

At its plainest, with GPT-2's parts, that is

    x = wte[tokens] + wpe[positions]                  # what each token is, and where it stands
    for block in blocks:
        x = x + block.attn(block.attn_norm(x))
        x = x + block.mlp(block.mlp_norm(x))
    logits = norm(x) @ wte.T                          # (B, T, V)
    loss = the mean over all b, t of -log(softmax(logits[b, t])[targets[b, t]])

and what follows adds better parts to choose from, and says why each is there. The file follows the
data: the whole model, positions, block, norm, attention, MLP, head, loss; then the first weights.
Settings, in shape.py, choose the parts; these combinations are published:

    GPT-2     learned positions, LayerNorm, GELU, biases, tied head (Radford et al. 2019)
    modern    rotary; RMSNorm, also after the embedding and on queries and keys; ReLU^2; no biases;
              a head of its own; capped logits (karpathy/nanochat): the default
    Llama     rotary, RMSNorm with weights, SwiGLU, no biases, a head of its own (arXiv:2302.13971);
              grouped heads in the largest of Llama 2 (arXiv:2307.09288) and all since Llama 3
    Qwen3     Llama's, with a norm of queries and keys (arXiv:2505.09388); the small ones of both
              have a tied head

Shapes in comments: B batch, T time (positions in this call), S positions attended to, C channels
(n_embd), H heads, K key/value heads, D channels of a head, V vocabulary. In config/small.py B is
16, T 128, C 128, H and K 4, D 32, V 2048.

This file says what is computed. Faster forms of most modules (engine/fast.py) take their places,
each only if, when a run starts, it gives the same numbers and gradients for random weights: so a
change that shows there is obeyed. For one that shows only elsewhere (in very large scores, say),
for prints and breakpoints give --fast=false, with which no other form is used. To see whether it
still is a GPT:

    python -m pytest tests/test_model.py -k "later or cached"

How it writes is told in generate.py, and `python huggingface.py import gpt2 out/gpt2` brings
GPT-2's own weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVCache
from shape import GPTConfig

IGNORE = -100  # a target that does not count: cross_entropy's own convention


class GPT(nn.Module):
    """The whole model. Call `init_weights`, or load weights, before using it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = config
        self.config = config
        self.wte = embedding(c, c.vocab_size)  # a vector for each token; the name is GPT-2's
        if c.position == "learned":
            self.wpe = embedding(c, c.block_size)  # and one for each position
        self.embed_norm = Norm(c.n_embd, c) if c.embed_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)  # in training, zeroes this share (arXiv:1207.0580)
        self.blocks = nn.ModuleList(new_block(c, layer) for layer in range(c.n_layer))
        self.norm = Norm(c.n_embd, c)
        self.head = Head(c)

    def trunk(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """All but the head: tokens (B, T) to the final hidden states (B, T, C).

        `mask` says who may look where, see `Attention`; None means causal. `positions`, (T) or
        (B, T), count from 0 if not given. `tokens` continue what each row of a `cache` holds and
        are appended to it. `embedded` (B, T, C) is read in place of their embeddings, for inputs
        that are not tokens. Raises ValueError if they do not fit block_size or the cache.
        """
        T = tokens.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens exceed block_size={self.config.block_size}")
        x = self.wte(tokens) if embedded is None else embedded  # (B, T, C)
        if cache is not None:  # it writes: these tokens follow those that are in the cache
            places, causal = cache.begin(T)
            positions = places if positions is None else positions
            mask = causal if mask is None else mask
        elif positions is None:
            positions = torch.arange(T, device=tokens.device)  # (T)
        rope = None
        if self.config.position == "learned":
            x = x + self.wpe(positions)
        else:
            rope = rotary(positions, self.config)  # for the attention of every block
        x = self.drop(self.embed_norm(x))
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.lengths += T
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) to float32 logits (..., V)."""
        return self.head(x, self.wte.weight)

    def cross_entropy(
        self, x: Tensor, targets: Tensor, reduction: str = "mean", smoothing: float = 0.0
    ) -> Tensor:
        """Hidden states (..., C) and `targets` (...) to the loss in nats, see `Head`: plainly,
        F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten())."""
        return self.head.cross_entropy(x, targets, self.wte.weight, reduction, smoothing)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        embedded: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Logits (B, T, V), or with `targets` (B, T) the cross-entropy in nats, mean or sum.

        `targets` are `tokens` shifted by one: at each position the token that comes next. So one
        pass over T tokens is T exercises in prediction. Targets of -100 do not count. `embedded`
        and `cache` as in `trunk`, `smoothing` as in `Head`.
        """
        x = self.trunk(tokens, mask, positions, cache, embedded)
        if targets is None:
            return self.logits(x)
        return self.cross_entropy(x, targets, reduction, smoothing)

    def init_weights(self, seed: int) -> None:
        """Draws the matrices of all modules that have a `std`, the size of their numbers: see the
        end of the file. On the CPU; they depend on `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if hasattr(module, "std"):
                draw(module, self.config, generator)

    def new_cache(self, batch: int = 1, size: int = 0, whole: bool = False) -> KVCache:
        """An empty KV cache for `batch` texts of up to `size` tokens (0: the whole context)."""
        like = self.wte.weight
        return KVCache(self.config, batch, like.device, like.dtype, size, whole)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


# --- positions


def rotary(positions: Tensor, c: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles: two of (T, D/2), or (B, T, D/2).

    Attention compares a query with keys. Without positions it would know what two tokens are, and
    not how far apart. Rotary positions (arXiv:2104.09864) turn queries and keys: pair i of their
    channels by the angle position * base^(-2i/D), fast for the first pairs, slowly for the last,
    like the hands of a clock.
    """
    # keep this order of operations: others use it, and at large positions rounding matters
    channels = torch.arange(0, c.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / c.rope_base ** (channels / c.head_dim)  # (D/2), radians a position
    if c.rope_factor != 1:
        # Llama 3.1 (github.com/meta-llama/llama-models): slows pairs that turn less than once in
        # the old context, keeps those that turn more than four times, and blends in between
        turns = c.rope_original * frequency / (2 * math.pi)
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / c.rope_factor
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of channels (a, b) of x (B, T, H, D) by its position's angle.

        a' = a cos - b sin          (a, b) is a point in the plane, turned about the origin
        b' = b cos + a sin

    Let R(m) turn by the angle m f, for position m. Turning two vectors alike changes no product of
    them, so R(m) q . R(n) k = q . R(n - m) k: a score depends on q, k and how far apart they stand,
    and no longer on where. Channels i and i + D/2 are a pair, as in GPT-NeoX and transformers;
    Meta's own Llama pairs 2i with 2i + 1, which is the same with other rows of wq and wk.
    (nutshell.py swaps T and H before it turns, and so has other shapes for the same.)
    """
    cos, sin = (z.unsqueeze(-2).to(x.dtype) for z in rope)  # (T, 1, D/2): the same for all heads
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --- block


class Block(nn.Module):
    """Attention, which moves information between positions, then an MLP at each position.

    Both add to x instead of replacing it (residual connections, arXiv:1512.03385): a sum hands
    the gradient on unchanged, so it reaches the first layer however many come after. Each reads x
    through a norm of its own (pre-norm, as in GPT-2), which leaves that sum alone.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn_norm = Norm(config.n_embd, config)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask, cache) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, cache))
        x = x + self.drop(self.mlp(self.mlp_norm(x)))
        return x


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension: RMSNorm (arXiv:1910.07467).

    LayerNorm (arXiv:1607.06450) takes away the mean first. Whatever the layers before have added
    up to, the next one gets vectors of the same length (times a learned weight, if there is one).
    """

    def __init__(self, dim: int, config: GPTConfig):
        super().__init__()
        self.centre = config.norm == "layer"
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if self.centre and config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # a mean of squares loses too many digits in bfloat16
        if self.centre:
            y = y - y.mean(dim=-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        y = y.to(x.dtype)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y


# --- attention


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, in H heads side by side (arXiv:1706.03762).

    Each position asks (query), offers (key) and tells (value). How well its query fits a key says
    how much of that position's value it takes. H heads can attend to H things at once; groups of
    H / K of them may share keys and values, to store fewer (arXiv:2305.13245).
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c = config
        self.config = config
        self.layer = layer
        bias = c.bias or c.qkv_bias
        self.wq = linear(c, c.n_embd, c.n_head * c.head_dim, bias)
        self.wk = linear(c, c.n_embd, c.n_kv_head * c.head_dim, bias)
        self.wv = linear(c, c.n_embd, c.n_kv_head * c.head_dim, bias)
        self.wo = linear(c, c.n_head * c.head_dim, c.n_embd, c.bias, residual=True)
        # with norms of q and k no score exceeds sqrt(D), times their weights if they have any. In
        # large models scores otherwise grow until all weight is on one token, and training fails
        # (arXiv:2302.05442)
        self.q_norm = Norm(c.head_dim, c) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(c.head_dim, c) if c.qk_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, rope, mask, cache) -> Tensor:
        """x (B, T, C) to (B, T, C). `mask`, boolean, (T, S) or (B, 1, T, S), is True where a
        position may look; None is causal."""
        B, T, _ = x.shape
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q = self.q_norm(self.wq(x).view(B, T, H, D))
        k = self.k_norm(self.wk(x).view(B, T, K, D))
        v = self.wv(x).view(B, T, K, D)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D): all that came before, too
        k = k.repeat_interleave(H // K, dim=1)  # (B, H, S, D): H / K heads share a key
        v = v.repeat_interleave(H // K, dim=1)
        if mask is None:  # causal
            mask = causal_mask(T, k.size(2), x.device)
        # a sum of D independent products of mean 0 and variance 1 has variance D, so size sqrt(D).
        # Divided by it, softmax begins soft, and a head can learn where to look; undivided, most of
        # the weight would lie on one place, by chance, and each small change of q throw it about
        scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
        scores = scores.masked_fill(~mask, -math.inf)  # e^-inf = 0: no weight at all
        weights = self.drop(scores.softmax(dim=-1))  # each row sums to 1
        y = weights @ v  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


def causal_mask(T: int, S: int, device=None) -> Tensor:
    """True where the last T of S positions may look: at themselves and what came before.

        1 0 0 0
        1 1 0 0        for T = S = 4
        1 1 1 0
        1 1 1 1

    and the last row alone for T = 1: a token that was just written sees all that stands before.

    Without a mask, a position could look at the very token that it is to predict: the loss would
    fall to nothing, and the model, which has nothing to look at when it writes, would have learned
    nothing.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


# --- MLP and head


class MLP(nn.Module):
    """Two layers, wide in between: C to mlp_dim to C, at each position alone.

    GELU as in GPT-2 (tanh form, arXiv:1606.08415), ReLU^2 (arXiv:2109.08668), or SwiGLU, which
    multiplies by a gate (arXiv:2002.05202; with mlp_dim = 8/3 C its three matrices are as many
    numbers as two with 4 C). Without such a non-linearity two layers would be no more than one.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = config
        functions = {"gelu": gelu, "relu2": relu2, "swiglu": F.silu}
        self.activation = functions[c.mlp]
        self.gate = linear(c, c.n_embd, c.mlp_dim, c.bias) if c.mlp == "swiglu" else None
        self.up = linear(c, c.n_embd, c.mlp_dim, c.bias)
        self.down = linear(c, c.mlp_dim, c.n_embd, c.bias, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


class Head(nn.Module):
    """A score for each token of the vocabulary: how well its vector fits the hidden state.

    A tied head uses the vectors of the embedding (arXiv:1608.05859). A head of its own that begins
    at zero finds all V tokens equally likely, so the first loss is -ln(1/V) = ln V.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = config
        self.cap = c.logit_cap
        self.weight = None
        if not c.tied:
            self.weight = nn.Parameter(torch.zeros(c.vocab_size, c.n_embd))
            self.std = 0.0 if c.zero_init else 0.02

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x (..., C) and the table of embeddings (V, C) to float32 logits (..., V)."""
        weight = table if self.weight is None else self.weight
        logits = F.linear(x, weight).float()
        if self.cap:  # no logit runs away, which keeps training stable (arXiv:2408.00118)
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def cross_entropy(
        self, x: Tensor, targets: Tensor, table: Tensor, reduction: str, smoothing: float
    ) -> Tensor:
        """-ln p(target): 0 where the model was sure and right, ln V where it finds all V tokens
        equally likely, more where it was sure and wrong; the mean or sum over all targets but those
        of -100.

        Softmax makes p of the logits: e^logit each, divided by their sum, so that they are positive
        and add up to 1. `smoothing` gives this share of each target to all tokens alike.
        """
        logits, targets = self(x, table).flatten(0, -2), targets.flatten()  # (N, V), (N)
        options = dict(ignore_index=IGNORE, reduction=reduction, label_smoothing=smoothing)
        return F.cross_entropy(logits, targets, **options)


# --- the first weights: of mean 0, and of which size
#
#                             zero_init, the default       GPT-2
#     wq, wk, wv, up, gate    inputs^-0.5, uniform         0.02, normal
#     wo, down                0                            0.02 / sqrt(2 n_layer), normal
#     a head of its own       0                            0.02, normal
#     wte, wpe                1, normal; 0.02 if tied or   0.02, normal (OpenAI's wpe: 0.01)
#                             not normed (embed_norm)


def embedding(c: GPTConfig, rows: int) -> nn.Embedding:
    """A table of vectors (rows, C), one for each id. `std` is the size of its first numbers.

    Where a norm follows, the size of a vector says only how fast it learns: 1 is as good as any.
    But a tied table is the head as well, and would make logits of size sqrt(C): it has 0.02, as in
    GPT-2; so has one that no norm follows, as GPT-2's.
    """
    table = nn.Embedding(rows, c.n_embd)
    table.std = 1.0 if c.embed_norm and c.zero_init and not c.tied else 0.02
    return table


def linear(c: GPTConfig, inputs: int, outputs: int, bias: bool, residual=False) -> nn.Linear:
    """x W^T + b, with the size `std` of its first weights; b begins at zero.

    Each output is a sum over `inputs` terms: weights of variance 1 / inputs keep its size. A
    `residual` layer, the last of a branch, begins at zero: then every block begins as the identity,
    and the sum of many random branches does not drown what the embedding says, however many there
    are (arXiv:1901.09321). It learns all the same, since the gradient of W is its input times what
    comes back from the loss. But nothing comes back through what is still zero, and a head of
    its own begins at zero, too, so

        the first step moves    the head
        the second              also residual layers and the embedding
        the third               everything
    """
    layer = nn.Linear(inputs, outputs, bias)
    if c.zero_init:
        layer.std = 0.0 if residual else inputs**-0.5
    else:
        layer.std = 0.02 / math.sqrt(2 * c.n_layer) if residual else 0.02
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def draw(module: nn.Module, c: GPTConfig, generator: torch.Generator) -> None:
    """The first weights of one module: of mean 0, and of the size that it has as `std`."""
    if module.std == 0:
        module.weight.zero_()
    elif isinstance(module, nn.Linear) and c.zero_init:
        bound = math.sqrt(3) * module.std  # uniform, of that variance: no weight is an outlier
        module.weight.uniform_(-bound, bound, generator=generator)
    else:
        module.weight.normal_(0.0, module.std, generator=generator)


# --- another kind of block, off by default


def new_block(config: GPTConfig, layer: int) -> Block:
    """A block; with `config.canon` one that is not only GPT's, see canon.py."""
    if config.canon > 1:
        from canon import CanonBlock  # not above, since it needs this file

        return CanonBlock(config, layer)
    return Block(config, layer)
