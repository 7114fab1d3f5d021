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

B, T = 16, 128  # windows in a batch, bytes in a window: what it can look back at
C, HEADS, LAYERS = 128, 4, 4  # channels of a byte, heads that look for different things, blocks
STEPS, RATE = 50, 2e-3  # how often it is corrected, and by how much


# --- the network


def norm(x):
    """Each vector at the same length, whatever the layers before have added up to."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Attention(nn.Module):
    """Looks back: each place takes from earlier ones what it needs.

    It asks by a query q. Each place offers a key k and tells a value v: the better the key fits the
    query, the more of its value is taken.
    """

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x):
        B, T, _ = x.shape
        D = C // HEADS
        q, k, v = (w(x).view(B, T, HEADS, D).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = q @ k.mT / math.sqrt(D)  # (B, HEADS, T, T): for each place, how well each key fits
        later = torch.ones(T, T, dtype=torch.bool).triu(1)  # true above the diagonal
        weights = scores.masked_fill(later, -math.inf).softmax(-1)  # 0 for what comes later
        found = weights @ v  # (B, HEADS, T, D): the mean of the values, by these weights
        return self.wo(found.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Thinks about what was found, at each place by itself."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x):
        x = x + self.attn(norm(x))  # both add to x and replace nothing: gradients pass unchanged
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, C)  # a vector for each byte: what it is
        self.wpe = nn.Embedding(T, C)  # and one for each place in the window: where it stands
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(C, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # at first all bytes are equally likely: a loss of ln 256

    def forward(self, tokens):
        """Bytes (B, T) to scores (B, T, 256), each made of the bytes up to its own place."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.size(1)]
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
