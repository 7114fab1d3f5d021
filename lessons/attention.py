"""Chapter 4: three tokens by hand, the root of D, the mask, heads; what the specimen looks at.

python -m lessons.attention out/small "def main("        what the heads of any run look at
"""

import math

import torch

import model
from engine import settings
from lessons import require, specimen
from shape import GPTConfig

BOOK = "model"
THREE = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])  # (1, 3, 2): three tokens


def plain():
    """One head of two channels whose four matrices change nothing: queries, keys, values are x."""
    c = GPTConfig(vocab_size=3, n_embd=2, n_head=1, n_layer=1, qk_norm=False, position="learned")
    attention = model.Attention(c, layer=0)
    for w in (attention.wq, attention.wk, attention.wv, attention.wo):
        torch.nn.init.eye_(w.weight)
    return attention


@torch.no_grad()
def third_token() -> float:
    attention, seen = plain(), []
    attention.drop.register_forward_pre_hook(lambda _, weights: seen.append(weights[0][0, 0]))
    y = attention(THREE, None, None, None)
    print("x\n", THREE[0].numpy())
    print("softmax(x x^T / sqrt(2)), causal\n", seen[0].numpy().round(3))
    print("Attention(x)\n", y[0].numpy().round(3))
    return seen[0][2, 2].item()


def undivided() -> float:
    """Scores of 64 channels: how large they are, how softmax begins, and what comes back of it."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1000, 64, generator=generator)
    scores = q @ k.mT  # a million of them
    print(f"D = 64   std(q.k) = {scores.std():.2f}   std(q.k / sqrt(D)) = {scores.std() / 8:.2f}")
    k, v = k[:16], torch.randn(16, 64, generator=generator)
    gradient = torch.randn(1000, 64, generator=generator)  # at what attention gives
    for name, root in (("q.k", 1), ("q.k / sqrt(D)", math.sqrt(64))):
        q = q.detach().requires_grad_()
        weights = (q @ k.mT / root).softmax(-1)  # (1000, 16)
        (weights @ v).backward(gradient)
        largest, size = weights.amax(-1).mean().item(), q.grad.square().mean().sqrt().item()
        print(f"largest of 16 weights {largest:.2f}   gradient at q {size:.2f}   softmax({name})")
    return scores.std().item()


@torch.no_grad()
def later_token() -> int:
    net, tokenizer = specimen.load()
    one, other = (specimen.read(tokenizer, text) for text in ("quick|quick", "quick|quicz"))
    moved = (net(one) - net(other))[0].abs().amax(-1)
    print("token   ", " ".join(f"{c:>5}" for c in ".quick|quick"))
    print("|change|", " ".join(f"{x:5.2f}" for x in moved))
    return int((moved[:-1] > 0).sum())


def reshaped() -> str:
    """Which way to cut channels into heads gives head 0 something of every token."""
    q = torch.arange(6 * 4).view(1, 6, 4)  # channel c of token t is the number 4 t + c
    ways = dict(a=q.view(1, 2, 6, 2), b=q.view(1, 6, 2, 2).transpose(1, 2))
    print("token 1 has the channels", q[0, 1].tolist())
    for letter, heads in ways.items():
        print(f"({letter}) {tuple(heads.shape)}   head 0: {heads[0, 0].tolist()}")
    tokens = {letter: {*(h[0, 0] // 4).flatten().tolist()} for letter, h in ways.items()}
    every = [letter for letter, seen in tokens.items() if len(seen) == 6]
    return every[0] if len(every) == 1 else "c"


@torch.no_grad()
def without(layer: int, head: int) -> float:
    """How many letters behind the bar the specimen gets right if a head says nothing."""
    net, tokenizer = specimen.load()
    D = net.config.head_dim
    net.blocks[layer].attn.wo.weight[:, head * D : (head + 1) * D] = 0
    return specimen.copied(net, tokenizer, 100)["right"]


def looks_at() -> str:
    net, tokenizer = specimen.load()
    text = "quick|qui"
    weights = specimen.attention(net, specimen.read(tokenizer, text))[:, :, -1]  # (L, H, S)
    names = "." + text
    print("layer head ", " ".join(f"{c:>4}" for c in names))
    for layer, heads in enumerate(weights):
        for head, w in enumerate(heads):
            print(f"{layer:5} {head:4} ", " ".join(f"{x:4.2f}" for x in w.tolist()))
    return names[weights[-1].amax(0).argmax()]


QUESTIONS = (third_token, undivided, later_token, reshaped, looks_at)


# --- checks


def causality():
    """A later token never changes an earlier logit: of the specimen, with the reader's code."""
    net, tokenizer = specimen.load()
    tokens = specimen.read(tokenizer, "quick|quick")
    other = tokens.clone()
    other[0, -1] = tokenizer.encode("z")[0]
    with torch.no_grad():
        moved = (net(tokens) - net(other))[0, :-1].abs().amax().item()
    require(moved < 1e-5, f"the last token changed an earlier logit by {moved:.3f}: the mask leaks")


def attend(function):
    """Exercise 4.a: attend(q, k, v), three (T, D), causal, is what one head computes."""
    for T, D in ((1, 2), (3, 2), (7, 8)):
        q, k, v = torch.randn(3, T, D, generator=torch.Generator().manual_seed(T))
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        wanted = (q @ k.T / math.sqrt(D)).masked_fill(later, -math.inf).softmax(-1) @ v
        y = function(q, k, v)
        require(y.shape == wanted.shape, f"for T={T} and D={D} the shape is {tuple(y.shape)}")
        off = (y - wanted).abs().amax().item()
        require(off < 1e-5, f"for T={T} and D={D} a number is off by {off:.3f}")


def causal_mask(function):
    """Exercise 4.b: a window of four; two layers then reach six tokens back."""
    seen = function(6, 6).tolist()
    wanted = [[0 <= i - j < 4 for j in range(6)] for i in range(6)]
    require(seen == wanted, "each token should see itself and the three before it, and no others")
    require(
        function(1, 6).tolist() == wanted[-1:], "the last of six alone (T=1, S=6) sees otherwise"
    )
    net, tokenizer = specimen.load()
    tokens = specimen.read(tokenizer, "abcdefghijkl")
    reach = []
    with torch.no_grad():
        for back in range(tokens.size(1)):
            other = tokens.clone()
            other[0, -1 - back] = tokenizer.encode("z")[0]
            moved = (net(tokens) - net(other))[0, -1].abs().amax()
            reach += [back] * bool(moved > 1e-6)
    require(max(reach) == 6, f"the last logits see {max(reach)} tokens back, and it should be 6")


CHECKS = (causality, attend, causal_mask)


# --- any run


def main(argv: list[str]) -> None:
    """For each layer and head the three tokens that the last position looks at most: which, at
    what position, with what weight."""
    net, tokenizer, tokens = specimen.asked(argv)
    names = [tokenizer.decode([i]) for i in tokens[0].tolist()]
    for layer, heads in enumerate(specimen.attention(net, tokens)[:, :, -1]):  # (H, S)
        for head, w in enumerate(heads):
            best = w.topk(min(3, len(names)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            print(layer, head, *(f" {names[i]!r} [{i}] {x:.2f}" for i, x in pairs))


if __name__ == "__main__":
    settings.run(main)
