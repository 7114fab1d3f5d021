"""Chapter 0: one window of text through all shapes, and what is learned."""

import math
from itertools import islice

import torch

import model
from lessons import require, specimen
from model import GPT
from shape import GPTConfig
from tasks import repeat

BOOK = "model"
SMALL = dict(vocab_size=2048)  # otherwise the default shape


def parameters() -> int:
    net = GPT(GPTConfig(**SMALL))
    for name, p in net.named_parameters():
        if "blocks" not in name or "blocks.0" in name:
            print(f"{name:24} {tuple(p.shape)!s:12} {p.numel():9,}")
    print(f"{'blocks.1 to blocks.3':37} {sum(p.numel() for p in net.blocks[1:].parameters()):9,}")
    return net.num_parameters()


@torch.no_grad()
def logits() -> int:
    net = GPT(GPTConfig(**SMALL))
    net.init_weights(seed=1)
    tokens = torch.arange(6)[None]
    for name in ("wte", "blocks.0.attn.wq", "blocks.0.mlp.up", "blocks.0", "norm", "head"):
        module = net.get_submodule(name)
        module.register_forward_hook(lambda _, x, y, n=name: print(f"{n:18} {tuple(y.shape)}"))
    print(f"{'tokens':18} {tuple(tokens.shape)}")
    return net(tokens).numel()


def mlp_to_attention() -> int:
    block = GPT(GPTConfig(**SMALL)).blocks[0]
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in block.named_children()}
    print(sizes)
    return sizes["mlp"] // sizes["attn"]


def surprise() -> float:
    """Nats a letter of the specimen, before and behind the bar."""
    net, tokenizer = specimen.load()
    text = next(islice(repeat.rows("test", 0), 3, None))["text"]
    for c, nats in zip(text, specimen.surprise(net, specimen.read(tokenizer, text)), strict=True):
        print(f"{c}  {nats:5.2f}  {'#' * round(8 * float(nats))}")
    found = specimen.copied(net, tokenizer, 200)
    print(" ".join(f"{name} {found[name]:.2f}" for name in ("before", "behind")), end="   ")
    print(f"ln 26 = {math.log(26):.2f}")
    return found["before"]


QUESTIONS = (parameters, logits, mlp_to_attention, surprise)


# --- checks


def begins_at_ln_v():
    """A new model finds all tokens equally likely."""
    net = model.GPT(GPTConfig(**SMALL))
    net.init_weights(seed=1)
    loss = net(torch.arange(6)[None], torch.arange(1, 7)[None]).item()
    require(abs(loss - math.log(2048)) < 1e-3, f"the first loss is {loss:.3f}, not ln 2048 = 7.625")


def count(function):
    """Exercise 0.a: count(V, C, L), the parameters of the default shape."""
    for V, C, L in ((2048, 128, 4), (257, 32, 2), (50257, 768, 12)):
        with torch.device("meta"):
            wanted = GPT(GPTConfig(vocab_size=V, n_embd=C, n_layer=L)).num_parameters()
        found = function(V, C, L)
        require(found == wanted, f"count({V}, {C}, {L}) is {found}, and there are {wanted}")


@torch.no_grad()
def read(function):
    """Exercise 0.b: read(net, tokens), all the shapes by hand, from the modules of the model."""
    net, tokenizer = specimen.load()
    tokens = specimen.read(tokenizer, "quick|qui")
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    found, wanted = function(net, tokens), net.logits(net.trunk(tokens))
    require(not calls, "call the modules inside the model, and not the model")
    require(found.shape == wanted.shape, f"its shape is {tuple(found.shape)}, not (1, 10, 257)")
    off = (found - wanted).abs().max().item()
    require(off < 1e-4, f"a logit is off by {off:.3f}")


CHECKS = (begins_at_ln_v, count, read)
