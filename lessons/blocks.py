"""Chapter 3: norm, residual stream, what moves first, the first loss."""

import math
from textwrap import shorten

import torch

import model
from lessons import require, specimen
from shape import GPTConfig

BOOK = "model"


def config(**changes) -> GPTConfig:
    return GPTConfig(**dict(vocab_size=257, n_layer=2, n_head=4, n_embd=32) | changes)


def made(**changes) -> model.GPT:
    net = model.GPT(config(**changes))
    net.init_weights(seed=1)
    return net


def windows(seed: int = 0) -> tuple:
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def norm() -> float:
    layer = model.Norm(2, config())
    for x in ([3.0, 4.0], [30.0, 40.0], [-3.0, -4.0]):
        print(x, "->", [round(y, 3) for y in layer(torch.tensor(x)).tolist()])
    return layer(torch.tensor([30.0, 40.0]))[0].item()


@torch.no_grad()
def first_loss() -> float:
    loss = made()(*windows()).item()
    for V in (257, 2048, 50257):
        print(f"V = {V:6,}   ln V = {math.log(V):.4f}")
    print(f"loss of a new model with V = 257: {loss:.4f}")
    return loss


def moved() -> int:
    """Which matrices get a gradient, in each of the first three steps of plain descent."""
    net, counts = made(), []
    for step in range(3):
        net(*windows()).backward()
        moving = [name for name, p in net.named_parameters() if p.grad.abs().max() > 0]
        counts.append(len(moving))
        of = len([*net.parameters()])
        some = shorten(" ".join(moving), 70, placeholder=" ...")
        print(f"step {step + 1}: {len(moving):2} of {of}   {some}")
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    return counts[0]


def bare(self, x, rope, mask, cache):
    """A block without the two additions."""
    return self.mlp(self.mlp_norm(self.attn(self.attn_norm(x), rope, mask, cache)))


def reaches() -> None:
    """Norm of the embedding's gradient by depth, with residual connections and without."""
    for layers in (2, 8, 32):
        found = []
        for forward in (model.Block.forward, bare):
            net = made(n_layer=layers, zero_init=False)
            for block in net.blocks:
                block.forward = forward.__get__(block)
            net(*windows()).backward()
            found.append(net.wte.weight.grad.norm().item())
        with_sum, without = found
        print(f"{layers:2} layers: with the sum {with_sum:.2f}, without {without:.2f}")


@torch.no_grad()
def grows() -> str:
    net, tokenizer = specimen.load()
    sizes = []
    for name in ("embed_norm", "blocks.0", "blocks.1", "norm"):
        hook = net.get_submodule(name).register_forward_hook
        hook(lambda _, x, y, n=name: sizes.append((n, y.square().mean().sqrt().item())))
    net(specimen.read(tokenizer, "nutshell|nuts"))
    for name, size in sizes:
        print(f"behind {name:10}  root of the mean square {size:6.2f}")
    first, last = sizes[0][1], sizes[2][1]
    return "a" if last > 2 * first else "c" if last < first / 2 else "b"


QUESTIONS = (norm, first_loss, moved, grows)


# --- checks


@torch.no_grad()
def learns():
    """One batch can be learned by heart: whatever was changed, gradients arrive."""
    with torch.enable_grad():
        net, (x, y) = made(), windows()
        first = net(x, y)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            loss = net(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    require(
        loss < first / 2, f"60 steps on one batch brought the loss from {first:.2f} to {loss:.2f}"
    )


def rms_norm(function):
    """Exercise 3.a: rms_norm(x, eps)."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 100.0, 1e-4):
        off = (function(scale * x, 1e-6) - model.Norm(32, config())(scale * x)).abs().max().item()
        require(off < 1e-4, f"for numbers of size {scale:g} it is off by {off:.4f}")
    require(not function(torch.zeros(1, 4), 1e-6).isnan().any(), "of zeros it makes nan: add eps")


@torch.no_grad()
def Block(cls):
    """Exercise 3.b: a parallel block, x + attn(norm(x)) + mlp(norm(x))."""
    net, (x, _) = made(), windows()
    begin = net.norm(net.embed_norm(net.wte(x)))
    off = (net.trunk(x) - begin).abs().max().item()
    require(off < 1e-5, f"a new block is no identity: it changes its input by {off:.3f}")
    for i, p in enumerate(net.parameters()):
        p.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    block, h = net.blocks[0], net.embed_norm(net.wte(x))
    rope = model.rotary(torch.arange(16), net.config)
    wanted = h + block.attn(block.attn_norm(h), rope, None, None) + block.mlp(block.mlp_norm(h))
    off = (block(h, rope, None, None) - wanted).abs().max().item()
    require(off < 1e-5, f"attention and MLP do not both read the same x: off by {off:.3f}")


CHECKS = (learns, rms_norm, Block)
