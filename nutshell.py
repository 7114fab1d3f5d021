"""A GPT on one page: python nutshell.py my_text.txt

It reads a text, learns to guess each next byte of it, and writes. Everything is here; only torch is
imported. Without a file it reads the source code of Python's own library.

    text      a row of bytes: numbers from 0 to 255
    batch     some windows of it, cut out anywhere; at each place the next byte is asked for
    GPT       gives every byte a score for being the next one
    learning  the weights move a little in the direction that makes the right scores higher
    writing   one byte is drawn, put behind the text, and the GPT is asked again

Shapes: B windows of T bytes, each byte a vector of C numbers. model.py, dataset.py, train.py and
generate.py tell it again with what was left out here: other parts to choose from, and why each is
as it is; words instead of bytes; runs that can be interrupted; speed. The network is one of theirs:
with the same weights, model.py gives the same scores (tests/test_nutshell.py).
"""

import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

B, T = 16, 64  # windows in a batch, bytes in a window: as far as it can look back
C, HEADS, LAYERS = 128, 4, 4  # channels of a byte, heads that look for different things, blocks
STEPS, RATE = 1000, 4e-3  # how often it is corrected, and by how much


# --- the network


def matrix(inputs, outputs, size=1.0):
    """y = W x, each y a sum of products. Drawn like this, y is `size` times as large as x is.

    A layer of size 0 begins as if it were not there, and learns all the same.
    """
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=size * inputs**-0.5)
    return layer


def norm(x):
    """Each vector at the same length, whatever the layers before have added up to (RMSNorm)."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turn(x):
    """Where x stands: each pair of its channels is turned, like the hand of a clock, by its place.

    The product of a query and a key that were turned depends on how far apart they stand. Some
    pairs turn fast, for what is near, and some slowly (rotary positions).
    """
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))  # (T, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class Attention(nn.Module):
    """Looks back: each place takes from itself and earlier ones what it needs.

    It asks by a query q. Each place offers a key k and tells a value v: the better the key fits the
    query, the more of its value is taken. Several heads do so side by side, D channels each.
    """

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (matrix(C, C) for _ in range(3))
        self.wo = matrix(C, C, size=0)

    def forward(self, x):
        B, T, _ = x.shape
        D = C // HEADS
        q, k, v = (w(x).view(B, T, HEADS, D).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = turn(norm(q)), turn(norm(k))  # (B, HEADS, T, D)
        scores = q @ k.mT / math.sqrt(D)  # (B, HEADS, T, T): for each place, how well each key fits
        later = torch.ones(T, T, dtype=torch.bool).triu(1)  # true above the diagonal
        weights = scores.masked_fill(later, -math.inf).softmax(-1)  # add up to 1; 0 for later ones
        found = weights @ v  # (B, HEADS, T, D): the mean of the values, by these weights
        return self.wo(found.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Thinks about what was found, at each place by itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = matrix(C, 4 * C), matrix(4 * C, C, size=0)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())  # without the bend, two matrices were one


class Block(nn.Module):
    """First looks, then thinks. What comes of it is added: nothing in x is lost on the way."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x):
        x = x + self.attn(norm(x))
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Bytes (B, T) to scores (B, T, 256): how likely each byte is the next, at each place."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, C)  # a vector for each byte
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = matrix(C, 256, size=0)  # at first all bytes are equally likely: loss ln 256

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(norm(x))


# --- learning and writing


def batch(text):
    """Windows x of a text, and y, the same moved by one: what comes next at each place."""
    starts = torch.randint(len(text) - T, (B,)).tolist()
    x = torch.stack([text[i : i + T] for i in starts])
    y = torch.stack([text[i + 1 : i + T + 1] for i in starts])
    return x.long(), y.long()


def loss(model, x, y):
    """How surprised the model is by what comes next: -ln p(right byte), the mean, in nats."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def write(model, prompt, count, temperature=0.8):
    """`prompt` and `count` bytes more. A temperature below 1 makes likely ones even likelier."""
    tokens = torch.tensor([list(prompt)])
    for _ in range(count):
        scores = model(tokens[:, -T:])[0, -1]  # those behind the last byte
        drawn = torch.multinomial((scores / temperature).softmax(0), 1)
        tokens = torch.cat([tokens, drawn[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main(files):
    torch.manual_seed(1)
    files = files or sorted(Path(os.__file__).parent.glob("*.py"))  # Python's own library
    text = b"".join(Path(file).read_bytes() for file in files)
    if len(text) < 20 * T:
        raise ValueError(f"{files[0]} has {len(text)} bytes: give it {20 * T} at least")
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(text) * 9 // 10  # the last tenth is kept apart: what was read may be known by heart
    train, val = text[:cut], text[cut:]

    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)  # smaller and smaller steps
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(text):,} bytes of text")
    for step in range(STEPS + 1):
        if step % (STEPS // 10) == 0:
            with torch.no_grad():
                nats = sum(loss(model, *batch(val)).item() for _ in range(20)) / 20
            print(f"step {step}: {nats:.3f} nats, {nats / math.log(2):.3f} bits a byte", flush=True)
        optimizer.zero_grad()
        loss(model, *batch(train)).backward()  # how the loss would change with each weight
        optimizer.step()  # and each weight moves against that
        falling.step()
    print(write(model, b"\n", 500))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as mistake:
        print(f"nutshell.py: {mistake}", file=sys.stderr)
        sys.exit(2)
