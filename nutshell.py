"""A GPT on one page: python nutshell.py my_text.txt

It reads a text, learns to guess each next byte of it, and writes; the model is not saved. It needs
torch and nothing else, and computes on the CPU. Without a file it reads the modules at the top of
Python's own library. Of tiny Shakespeare (1.1 MB) it learned for two and a half minutes on two
shared cores, to a validation loss of about 1.75 nats.

    text      a row of bytes, numbers from 0 to 255: these are its tokens
    batch     some windows of it, cut out anywhere; at each place the next byte is the target
    GPT       gives each of the 256 bytes a score for being the next one (logits); softmax makes
              probabilities p of them
    loss      how surprised it was by the byte that did come next: -ln p, in nats
    step      each parameter is moved a little, to where the loss would be lower, as this batch and
              the last few tell
    writing   a byte is drawn by its probability (made a little sharper: `temperature`) and
              appended, and the GPT is asked again

Shapes in comments: B windows of T bytes; C numbers (channels) for each byte; H heads of D = C / H
channels. The other files tell it again with what was left out here: better parts, and why; tokens
that are pieces of words; runs that can be interrupted; speed. The network is that of model.py less
two parts: with embed_norm=false and logit_cap=0 it gives the same logits for the same weights, up
to rounding (tests/test_nutshell.py); the first weights are drawn otherwise.
"""

import argparse
import math
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

BATCH, CONTEXT = 16, 64  # windows in a batch; bytes in a window, as far as it can look back
WIDTH, HEADS, LAYERS = 128, 4, 4  # C, a multiple of 2 H; H; how many blocks
STEPS, RATE = 1000, 4e-3  # how often it is corrected; the first learning rate, found by trying


# --- the network


def matrix(inputs, outputs, zero=False):
    """A layer y = W x. Its first weights are zero, or random, and then of such a size that a number
    of y, which is a sum of `inputs` products, is about as large as one of x."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0 if zero else inputs**-0.5)
    return layer


def norm(x):
    """x with a mean square of 1 in its last dimension (RMSNorm): so each layer reads numbers of one
    size, however much the ones before have added up."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # 1e-6: never divide by 0


def rotate(x):
    """Marks x (B, H, T, D) with its place: channels i and i + D/2 are a point (a, b), which is
    turned about the origin by an angle that grows with the place, like the hand of a clock (rotary
    positions, arXiv:2104.09864). Some points turn fast, which tells neighbours apart, others
    slowly, which tells far places apart.

    A query at place m is turned by m times its angle, a key at place n by n times. If both are
    turned back by m times, their dot product stays as it is, with the query at 0 and the key at
    n - m. So a score knows how far apart the two are, and not where.
    """
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))  # (T, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class Attention(nn.Module):
    """Looks back: each place takes from itself and earlier ones what it needs.

    It asks by a query q. Each place offers a key k and tells a value v: the better a key fits the
    query, the more of its value is taken. H heads do so side by side, and can look for H things.
    """

    def __init__(self):
        super().__init__()
        self.wq = matrix(WIDTH, WIDTH)
        self.wk = matrix(WIDTH, WIDTH)
        self.wv = matrix(WIDTH, WIDTH)
        self.wo = matrix(WIDTH, WIDTH, zero=True)

    def forward(self, x):
        B, T, C = x.shape
        q = self.wq(x).view(B, T, HEADS, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.wk(x).view(B, T, HEADS, -1).transpose(1, 2)
        v = self.wv(x).view(B, T, HEADS, -1).transpose(1, 2)
        q, k = rotate(norm(q)), rotate(norm(k))  # of one length, sqrt(D)
        # two such vectors, taken at random, have a dot product of about sqrt(D). Undivided, most of
        # the weight would lie on one place from the start; moving a score would then hardly change
        # the weights, and little gradient come through
        scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, T): a row asks, a column is asked
        # the causal mask: what comes later gets no attention, or each place would read its answer
        later = torch.ones(T, T, dtype=torch.bool).triu(1)  # true where the column is later
        attention = scores.masked_fill(later, -math.inf).softmax(-1)  # each row adds up to 1
        found = attention @ v  # (B, H, T, D): the mean of the values, weighted so
        return self.wo(found.transpose(1, 2).reshape(B, T, C))  # the heads side by side again


class MLP(nn.Module):
    """Thinks about what was found: C to 4 C to C numbers, at each place by itself."""

    def __init__(self):
        super().__init__()
        self.up = matrix(WIDTH, 4 * WIDTH)
        self.down = matrix(4 * WIDTH, WIDTH, zero=True)

    def forward(self, x):
        # ReLU^2, the non-linearity: without one, both matrices would be no more than a single one
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """First looks, then thinks. What comes of it is added to x, and does not replace it (residual):
    a sum hands the gradient on as it is, so it reaches the first block however many follow.

    `wo` and `down` begin at zero, so nothing is added at first: sums of random blocks would drown
    what the embedding says. They learn all the same, since the gradient of W is its input times
    what comes back from the loss. But nothing comes back through a zero: the first step moves the
    head alone, the second also `wo`, `down` and the embedding, the third everything.
    """

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = MLP()

    def forward(self, x):
        x = x + self.attn(norm(x))
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Bytes (B, T) to logits (B, T, 256): at each place, for the byte that comes next."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, WIDTH)  # for each byte C numbers, at first random, of size 1
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = matrix(WIDTH, 256, zero=True)  # at first all logits are equal: ln 256 nats

    def forward(self, tokens):
        x = self.wte(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(norm(x))


# --- learning and writing


def batch_of(text):
    """Random windows x of a text, and their targets y: the same moved by one. Both (B, T)."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,)).tolist()
    x = torch.stack([text[i : i + CONTEXT] for i in starts])
    y = torch.stack([text[i + 1 : i + CONTEXT + 1] for i in starts])
    return x, y


def loss_of(model, x, y):
    """The mean of -ln p(target), in nats: 0 for sure and right, ln 256 = 5.55 for knowing nothing,
    more for sure and wrong. Softmax, inside, makes probabilities of logits: e^logit each, divided
    by their sum."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()  # keeps nothing for a backward(): less memory, and faster
def report(model, step, train_batches, val_batches):
    """Prints the loss on batches of text that it learns from, and of text that it does not."""
    known = sum(loss_of(model, x, y).item() for x, y in train_batches) / len(train_batches)
    new = sum(loss_of(model, x, y).item() for x, y in val_batches) / len(val_batches)
    bits = f"{new / math.log(2):.2f} bits a byte (stored plainly: 8)"
    line = f"step {step}: training loss {known:.2f}, validation loss {new:.2f} nats = {bits}"
    print(line, flush=True)


@torch.no_grad()
def write(model, prompt, count, temperature=0.8):
    """The text of `prompt`, one byte at least, and of `count` bytes more.

    A `temperature` below 1, and above 0, makes what is likely likelier. For each byte the last
    window is read anew; generate.py keeps what was read (a KV cache), and pick.py can leave out
    what is unlikely.
    """
    tokens = torch.tensor([list(prompt)])  # (1, T)
    for _ in range(count):
        logits = model(tokens[:, -CONTEXT:])[0, -1]  # (256): of the last place
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1)
        tokens = torch.cat((tokens, drawn[None]), dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main(argv):
    parser = argparse.ArgumentParser(description="A GPT on one page: it reads a text, and writes.")
    parser.add_argument("files", nargs="*", help="texts to read; none: Python's own library")
    library = Path(sysconfig.get_path("stdlib")).glob("*.py")
    files = parser.parse_args(argv).files or sorted(library)
    try:
        text = b"".join(Path(file).read_bytes() for file in files)
    except OSError as error:
        parser.error(f"{error.filename} cannot be read ({error.strerror}): name a text file")
    if len(text) < 20 * CONTEXT:  # of which the last tenth has to hold a window
        parser.error(f"{len(text)} bytes of text are too few: give it {20 * CONTEXT} at least")

    torch.manual_seed(1)
    text = torch.tensor(list(text))
    cut = len(text) * 9 // 10  # it never learns from the end: what was read may be known by heart
    train, val = text[:cut], text[cut:]
    looked_at = [[batch_of(part) for _ in range(20)] for part in (train, val)]  # 20 batches of each

    model = GPT()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text")
    for step in range(STEPS):
        if step % 100 == 0:
            report(model, step, *looked_at)
        # large steps first, smaller and smaller ones to settle
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        loss_of(model, *batch_of(train)).backward()  # p.grad: how the loss would change with p
        # moves each parameter p by about the rate, against the mean of its last ten or so p.grad
        # (beta 0.9); by less where they disagree, as a mean of squares tells (0.95, of the last
        # twenty): Adam, arXiv:1412.6980
        optimizer.step()
        optimizer.zero_grad()  # or the next gradient would be added to this one
    report(model, STEPS, *looked_at)
    print(write(model, b"\n", 500))


if __name__ == "__main__":
    main(sys.argv[1:])
