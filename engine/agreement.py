"""Does a part of engine/fast.py agree with the book? Both get the same weights and the same input.

What they give is compared, and all gradients; with and without mask, positions and cache. The book
in float32 is the truth. In a shorter type the book itself is a little off: a part may be twice as
far off.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from canon import Canon
from model import IGNORE, MLP, Attention, Head, KVCache, Norm, rotary
from shape import GPTConfig

SHORT = 512  # longest context for which plain products beat the fused kernel in bfloat16, and with
# ShortAttention in float32 half of it
LONG = 8192  # longest context after which a token is tried: its cache is quick to fill


def largest_error(
    reference: type,
    parts: dict[type, type],
    config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> float:
    """Of what a part gives for `reference`, a module of the book, in units of what is allowed.
    `parts` has those for the modules inside it, too."""
    g = torch.Generator().manual_seed(0)
    # one layer and few tokens, to be quick; all else is as in the model
    c = replace(config, n_layer=1, vocab_size=min(config.vocab_size, 509), dropout=0.0)
    new = {
        nn.Embedding: lambda: nn.Embedding(c.vocab_size, c.n_embd),
        Norm: lambda: Norm(c.head_dim, c),
        Canon: lambda: Canon(replace(c, canon=c.canon if c.canon > 1 else 4), 0),
        Attention: lambda: Attention(c, 0),
        MLP: lambda: MLP(c),
        Head: lambda: Head(c),
    }
    module = new[reference]()
    with torch.no_grad():
        for p in module.parameters():  # none is zero, or two wrong forms would agree on nothing
            mean, std = (0.0, 2 * p.size(-1) ** -0.5) if p.ndim > 1 else (1.0, 0.3)
            p.copy_(torch.empty(p.shape).normal_(mean, std, generator=g))
    module.to(device)
    worst = 0.0
    for call, x, with_gradients in trials(reference, c, device, g, training):
        learn = training and with_gradients
        module.train(learn)
        kind = torch.float32 if training and not with_gradients else dtype
        true = results(call, x, module, torch.float32, learn)
        slow = true if kind == torch.float32 else results(call, x, module, kind, learn)
        kinds = {m: type(m) for m in module.modules()}
        for m in kinds:
            m.__class__ = parts.get(type(m), type(m))
        fast = results(call, x, module, kind, learn)
        for m in kinds:
            m.__class__ = kinds[m]
        usual = max(map(rms, true))
        for t, s, f in zip(true, slow, fast, strict=True):
            # a gradient that is zero, as that of a bias of keys with learned positions, has no
            # digits to compare: it gets what was rounded on the way, by a fused kernel elsewhere
            size = max(rms(t), (0.5 if rms(t) < 1e-4 * usual else 0.1) * usual)
            rounding = max(1e-4, 2 * torch.finfo(kind).eps) * size
            worst = max(worst, rms(f - t) / (2 * rms(s - t) + rounding + 1e-30))
    return worst


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def results(call: Callable, x: Tensor, module, dtype: torch.dtype, learn: bool) -> list[Tensor]:
    """What `call(module, x)` gives in `dtype`, and if asked for, all gradients; as float32."""
    if not learn:
        if dtype != torch.float32:
            module = copy.deepcopy(module).to(dtype)
        with torch.no_grad():
            y = call(module, x if x.dtype == torch.long else x.to(dtype))
        return [y.float()]
    wanted = list(module.parameters())  # they stay float32
    if x.is_floating_point():
        x = x.to(dtype).detach().requires_grad_()
        wanted.append(x)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = call(module, x).float()
    direction = torch.arange(y.numel(), device=y.device).cos().view(y.shape)
    gradients = torch.autograd.grad((y * direction).sum(), wanted, allow_unused=True)
    return [y.detach(), *(g.float() for g in gradients if g is not None)]


def trials(
    reference: type, c: GPTConfig, device: torch.device, g: torch.Generator, training: bool
) -> Iterator[tuple]:
    """What a part is tried with: a call of (module, x), an x, and whether gradients count."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    if reference is nn.Embedding:
        yield lambda m, x: m(x), torch.randint(c.vocab_size, (2, 7), generator=g).to(device), True
    elif reference is Norm:
        for size in (1.0, 1e-3):  # in the second the small constant below the root counts, too
            for with_gradients in (True, False):
                yield lambda m, x: m(x), size * normal(2, 7, c.head_dim), with_gradients
    elif reference is Head:
        table = normal(c.vocab_size, c.n_embd)
        for T in (1, 7):
            yield lambda m, x: m(x, table.to(x.dtype)), normal(2, T, c.n_embd), True
            targets = torch.randint(c.vocab_size, (2, T), generator=g).to(device)
            targets[0, 0] = IGNORE
            for how in (("mean", 0.0), ("sum", 0.1)):

                def loss(m, x, targets=targets, how=how):
                    return m.cross_entropy(x, targets, table.to(x.dtype), *how)

                yield loss, normal(2, T, c.n_embd), True
    elif reference is Canon:
        rows = torch.tensor([[0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]], device=device)
        mask = (rows[:, :, None] == rows[:, None])[:, None]  # (2, 1, 7, 7)
        for T, seen in ((2, None), (7, None), (7, mask[0, 0]), (7, mask)):
            yield lambda m, x, k=seen: m(x, k, None), normal(2, T, c.n_embd), True
    elif reference is MLP:
        yield lambda m, x: m(x), normal(2, 7, c.n_embd), True
    else:
        yield from attention_trials(c, device, g, normal, training)


def attention_trials(
    c: GPTConfig, device: torch.device, g: torch.Generator, normal: Callable, training: bool
) -> Iterator[tuple]:
    # the last is as long as the model sees, for somebody may have changed how far that is; or one
    # more than SHORT, where the long form has its turn
    for T in sorted({min(T, c.block_size) for T in (7, 33, SHORT + 1)}):
        rows = 2 if T <= 33 else 1
        where = torch.arange(T, device=device)
        seen = (torch.rand(2, 1, T, T, generator=g) < 0.5).to(device)
        seen |= torch.eye(T, dtype=torch.bool, device=device)
        # causal; who sees whom, for all rows and for each; positions of each row
        masks = ((where, None), (where, seen[0, 0]), (where.flip(0).expand(2, T), seen))
        if rows == 1:
            masks = masks[:1] if training else ()  # the prompt below will do
        for at, mask in masks:
            rope = rotary(at, c) if c.position == "rotary" else None
            yield lambda m, x, r=rope, k=mask: m(x, r, k, None), normal(rows, T, c.n_embd), True

        def in_pieces(module, x: Tensor) -> Tensor:
            """With a KV cache: a prompt, one token, and several more at once."""
            stored = x.dtype if type(module) is Attention else torch.float32
            cache = KVCache(c, x.size(0), device, stored, size=x.size(1) + 2)
            if x.size(1) > 7:
                cache.lengths[1:] = 2  # behind a text that is longer
            parts = []
            for piece in x.split([x.size(1) - 4, 1, 3], dim=1):
                at, mask = cache.begin(piece.size(1))
                rope = rotary(at, c) if c.position == "rotary" else None
                parts.append(module(piece, rope, mask, cache))
                cache.lengths += piece.size(1)
            return torch.cat(parts, dim=1)

        if T > 4:
            yield in_pieces, normal(rows, T, c.n_embd), False

    size = min(c.block_size, LONG)
    k, v = normal(2, c.n_kv_head, size, c.head_dim)

    def at_the_end(module, x: Tensor) -> Tensor:
        """One token, and a whole context before it: how far it looks may have been changed."""
        stored = x.dtype if type(module) is Attention else torch.float32
        cache = KVCache(c, 1, device, stored, size=size)
        cache.k[-1, 0], cache.v[-1, 0] = k, v
        cache.lengths[:] = size - 1
        at, mask = cache.begin(1)
        rope = rotary(at, c) if c.position == "rotary" else None
        return module(x, rope, mask, cache)

    yield at_the_end, normal(1, 1, c.n_embd), False


@torch.no_grad()
def same_in_all_layers(config: GPTConfig) -> bool:
    """Whether the book's attention computes the same whatever the number of its layer, for which a
    fast form does not ask. Then the first speaks for all; to try each with it would be slow."""
    narrow = dict(n_embd=min(config.n_embd, 64), head_dim=min(config.head_dim, 16))
    c = replace(config, dropout=0.0, **narrow)  # as many heads and positions, in less time
    g = torch.Generator().manual_seed(0)
    size = min(c.block_size, LONG)
    past = torch.randn(2, 1, c.n_kv_head, size - 1, c.head_dim, generator=g)
    whole = SimpleNamespace(append=lambda layer, k, v: torch.cat((past, torch.stack((k, v))), 3))
    where = torch.arange(size)
    some, few, last = where[:129], where[:7], where[-1:]
    seen = (torch.rand(len(few), len(few), generator=g) < 0.5) | torch.eye(len(few)).bool()
    tries = [
        (torch.randn(1, len(at), c.n_embd, generator=g), rotary(at, c), mask, cache)
        for at, mask, cache in ((some, None, None), (few, seen, None), (last, None, whole))
    ]
    weights = Attention(c, 0).state_dict()

    def tried(layer: int) -> Tensor:
        with torch.device("meta"):  # weights of its own would take time
            module = Attention(c, layer)
        module.load_state_dict(weights, assign=True)
        found = []
        for x, rope, mask, cache in tries:
            module.train(cache is None)  # as where it learns, and where it writes
            found.append(module(x, None if c.position == "learned" else rope, mask, cache))
        return torch.cat(found, dim=1)

    first = tried(0)
    return all(torch.allclose(tried(layer), first, rtol=1e-4) for layer in range(1, c.n_layer))
