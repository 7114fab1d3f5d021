"""Chapter 6: from logits to nats, bits and perplexity; the bend; what each layer already knows.

python -m lessons.scores out/small "def main("        what each layer of any run would say next
"""

import math

import torch

import model
from engine import settings
from lessons import require, specimen
from shape import GPTConfig

BOOK = "model"


def nats() -> float:
    logits = torch.tensor([2.0, 1.0, 0.0])
    p = logits.softmax(-1)
    print("e^logit ", " ".join(f"{x:.3f}" for x in logits.exp().tolist()))
    print("p       ", " ".join(f"{x:.3f}" for x in p.tolist()))
    print("-ln p   ", " ".join(f"{-math.log(x):.3f}" for x in p.tolist()))
    return -math.log(p[0])


def bits() -> float:
    for V in (2, 26, 257):
        said = f"{math.log(V):.3f} nats = {math.log2(V):.3f} bits, perplexity {V}"
        print(f"{V:3} equally likely: {said}")
    return math.log2(257)


@torch.no_grad()
def capped() -> float:
    c = GPTConfig(vocab_size=1, n_embd=1, n_head=1, head_dim=2)
    head = model.Head(c)
    head.weight.fill_(1.0)
    for x in (1.0, 5.0, 15.0, 30.0, 100.0):
        print(f"{x:5.0f} -> {head(torch.tensor([x]), None).item():.2f}")
    return head(torch.tensor([30.0]), None).item()


@torch.no_grad()
def linear() -> str:
    """Two layers without a bend between them are one."""
    mlp = model.MLP(GPTConfig(vocab_size=1))
    mlp.activation = lambda x: x
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    one = x @ (mlp.down.weight @ mlp.up.weight).T
    off = (mlp(x) - one).abs().max().item()
    print(f"down(up(x)) - x (down up)^T: at most {off:.1e}")
    mlp.activation = model.relu2
    print(f"with relu2 between them:     at most {(mlp(x) - one).abs().max():.1e}")
    return "a" if off < 1e-5 else "b"


@torch.no_grad()
def layers(net, tokenizer, tokens) -> list[str]:
    """What the head would say next behind the embedding and behind each block, of tokens (1, T):
    norm and head of the stream so far. Prints the three likeliest, returns the first of them."""
    seen, said = [], []
    modules = (net.embed_norm, *net.blocks)
    hooks = [m.register_forward_hook(lambda _, x, y: seen.append(y)) for m in modules]
    net(tokens)
    for hook in hooks:
        hook.remove()
    for layer, x in enumerate(seen):
        best = net.logits(net.norm(x))[0, -1].softmax(-1).topk(3)
        words = [tokenizer.decode([i]) for i in best.indices.tolist()]
        pairs = zip(words, best.values.tolist(), strict=True)
        print(f"behind {layer} blocks  ", "   ".join(f"{w!r} {p:.2f}" for w, p in pairs))
        said.append(words[0])
    return said


def lens() -> int:
    net, tokenizer = specimen.load()
    return layers(net, tokenizer, specimen.read(tokenizer, "quick|qui")).index("c")


QUESTIONS = (nats, bits, linear, capped, lens)


# --- checks


def one_pass_many_losses():
    """The loss is the mean of -ln p(target) over all positions that count."""
    net, tokenizer = specimen.load()
    tokens = specimen.read(tokenizer, "quick|quick")
    with torch.no_grad():
        loss = net(tokens[:, :-1], tokens[:, 1:]).item()
        wanted = specimen.surprise(net, tokens).mean().item()
    require(abs(loss - wanted) < 1e-4, f"the loss is {loss:.4f}, the mean of -ln p is {wanted:.4f}")


def cross_entropy(function):
    """Exercise 6.a: cross_entropy(logits, targets), also where e^logit is too large a number."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator)
    targets = torch.randint(11, (7,), generator=generator)
    for size in (1.0, 50.0, 1000.0):
        wanted = torch.nn.functional.cross_entropy(size * logits, targets).item()
        found = float(function(size * logits, targets))
        near = abs(found - wanted) <= 1e-4 * max(1, wanted)
        require(near, f"for logits of size {size:g} it is {found:.4f}, and should be {wanted:.4f}")


def bits_per_byte(function):
    """Exercise 6.b: bits_per_byte(loss, tokens, bytes), which compares any two vocabularies."""
    for values, wanted in (((math.log(256), 100, 100), 8.0), ((2.0, 250, 1000), 0.7213)):
        found = function(*values)
        require(abs(found - wanted) < 1e-3, f"bits_per_byte{values} is {found:.4f}, not {wanted}")


CHECKS = (one_pass_many_losses, cross_entropy, bits_per_byte)


def main(argv: list[str]) -> None:
    layers(*specimen.asked(argv))


if __name__ == "__main__":
    settings.run(main)
