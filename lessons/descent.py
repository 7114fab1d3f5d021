"""Chapter 7: rates, Adam, Muon, clipping, passes; depth that is needed."""

import math
from types import SimpleNamespace

import torch

import optim
from lessons import require
from model import GPT
from shape import GPTConfig

BOOK = "optim"


def rates() -> float:
    for step in (0, 300, 600, 900, 1200, 1499):
        rate = 0.02 * optim.learning_rate(step, 1500, 0, 0.8, 0, "linear")
        print(f"update {step:4}   lr {rate:.5f}   {'#' * round(2000 * rate)}")
    return 0.02 * optim.learning_rate(900, 1500, 0, 0.8, 0, "linear")


def adam() -> float:
    moved = 0.0
    for gradient in (0.001, 1.0, 1000.0):
        w = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0)
        w.grad = torch.full((1,), gradient)
        optimizer.step()
        moved = abs(w.item())
        print(f"gradient {gradient:8}   plain {0.01 * gradient:8}   Adam {moved:.4f}")
    return moved


def orthogonal() -> float:
    s = torch.tensor([1.0, 0.5, 0.1, 0.01])
    g = torch.diag(s)[None]
    after = optim.orthogonalise(g)[0].diagonal()
    for a, b in zip((s / s.norm()).tolist(), after.tolist(), strict=True):
        print(f"singular value {a:.3f} -> {b:.3f}")
    return after[0].item() / after[2].item()


def clipped() -> float:
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([3.0, 4.0])
    norm = torch.nn.utils.clip_grad_norm_([w], 1.0)
    print(f"norm {norm:.0f}   clipped to 1: {[round(x, 2) for x in w.grad.tolist()]}")
    return w.grad[0].item()


def passes() -> float:
    """A batch in one pass, and in four that are added up: the largest difference, in percent."""
    net = GPT(GPTConfig(vocab_size=257, n_layer=2, n_embd=32, zero_init=False))
    net.init_weights(seed=1)
    tokens = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(0))
    grads = []
    for size in (8, 2):
        net.zero_grad()
        for part in tokens.split(size):
            (net(part[:, :-1], part[:, 1:], reduction="sum") / (8 * 16)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    off = ((grads[0] - grads[1]).norm() / grads[0].norm()).item()
    print(f"norm of the gradient {grads[0].norm():.6f} and {grads[1].norm():.6f}")
    print(f"of the difference    {(grads[0] - grads[1]).norm():.1e}")
    return 100 * off


def shallow() -> str:
    from lessons import ablations  # loads train.py

    found = ablations.learn(1, ablations.ABLATIONS["one_layer"])["behind"]
    print(f"one layer, behind the bar: {found:.2f}   guessing: {math.log(8):.2f}")
    return "b" if found < 0.5 else "a"


QUESTIONS = (rates, adam, orthogonal, clipped, passes, shallow)


# --- checks


def each_parameter_once():
    """Every parameter belongs to one group of one optimizer, with its full rate kept."""
    names = dict(optimizer="muon", lr=0.02, embed_lr=0.3, head_lr=0.004, momentum=0.95)
    s = SimpleNamespace(**names, beta1=0.8, beta2=0.95, weight_decay=0.0)
    net = GPT(GPTConfig(vocab_size=257, n_layer=1, n_embd=32))
    groups = [g for o in optim.make_optimizers(net, s, torch.float32) for g in o.param_groups]
    owned = [p for group in groups for p in group["params"]]
    require(
        len(owned) == len(set(owned)) == len([*net.parameters()]),
        "a parameter has no group, or two",
    )
    require(all(g["base_lr"] == g["lr"] for g in groups), "a group has not kept its full rate")


def learning_rate(function):
    """Exercise 7.a: the factor on the rates: rise, hold, fall along a cosine."""
    for step, wanted in (
        (0, 1 / 11),
        (9, 10 / 11),
        (10, 1),
        (49, 1),
        (75, 0.55),
        (50, 1),
        (100, 0.1),
    ):
        found = function(step, 100, 10, 0.5, 0.1, "cosine")
        require(
            abs(found - wanted) < 1e-6, f"at step {step} of 100 it is {found:.3f}, not {wanted:.3f}"
        )


def adam_step(function):
    """Exercise 7.b: adam_step(w, g, m, v, step, lr, beta1, beta2, eps): new w, m, v."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, generator=generator))
    theirs = torch.optim.Adam([w], lr=0.1, betas=(0.8, 0.95), eps=1e-8)
    mine, m, v = w.detach().clone(), torch.zeros(6), torch.zeros(6)
    for step in range(1, 6):
        g = torch.randn(6, generator=generator)
        w.grad = g.clone()
        theirs.step()
        mine, m, v = function(mine, g, m, v, step, 0.1, 0.8, 0.95, 1e-8)
        off = (mine - w.detach()).abs().max().item()
        require(off < 1e-5, f"after step {step} a weight is off by {off:.4f}")


CHECKS = (each_parameter_once, learning_rate, adam_step)
