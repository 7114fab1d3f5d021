"""A GPT on one page: python nutshell.py my_text.txt

It reads a text, learns to guess each next byte of it, and writes; the model is not saved. It needs
torch and nothing else, and computes on the CPU. Without a file it reads Python's own library, the
modules of its main folder. Tiny Shakespeare (1.1 MB) took two and a half minutes of two shared
cores, to a validation loss of about 1.75 nats.

    text      a row of bytes, numbers from 0 to 255: these are its tokens
    batch     some windows of it, cut out anywhere; at each place the next byte is the target
    GPT       generative pretrained Transformer: gives each of the 256 bytes a score for being the
              next one (logits); softmax makes probabilities p of them
    loss      how surprised it was by the byte that did come next: -ln p, in nats. 1.75 nats is as
              unsure as among six bytes (e^1.75) equally likely; it begins at ln 256 = 5.55
    step      the parameters are moved a little, in a direction that should lower the loss, judged
              by this batch and the last few
    place     a position in the window, from 0 to T - 1
    writing   a byte is drawn by its probability (made a little sharper: `temperature`) and
              appended, and the GPT is asked again

Shapes in comments: B = 16 windows of T = 64 bytes; C = 128 numbers (channels) for each byte; H = 4
heads of D = C / H = 32 channels. The other files say more: better parts, and why; tokens that are
pieces of words; runs that can be interrupted; speed. model.py has this network, too: with
embed_norm=false, logit_cap=0 and the same weights its logits are equal, up to rounding
(tests/test_nutshell.py). Only the first weights are drawn differently. train.py learns with Muon
for the matrices (optim.py says why), a rate that holds before it falls, and on a GPU.
"""

import argparse
import math
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

BATCH, CONTEXT = 16, 64  # B, windows in a batch; T, bytes in one: as far as it can look back
WIDTH, HEADS, LAYERS = 128, 4, 4  # C, a multiple of 2 H (`rotate` has pairs); H; blocks
STEPS = 1000  # how often it is corrected: 1.0 million bytes are read, tiny Shakespeare about once
RATE = 4e-3  # the first learning rate, found by trying; a wider model wants less, 1e-3 or so


# --- the network


def matrix(inputs, outputs, zero=False):
    """A layer y = W x. Each number in y is a sum of `inputs` products, which partly cancel where
    weights are random: it is about sqrt(inputs) times as large as one of them. So first weights
    of standard deviation inputs^-0.5 make y about as large as x."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0 if zero else inputs**-0.5)
    return layer


def norm(x):
    """x with a mean square of 1 in its last dimension (RMSNorm): so each layer reads numbers of one
    size, however large x has become."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # 1e-6: never divide by 0


def rotate(x):
    """Marks x (B, H, T, D), queries or keys, with its place (rotary positions, arXiv:2104.09864);
    without that, a score would know what two bytes are, and not how far apart they stand (later
    blocks could guess it: the first place has looked back at one, the tenth at ten).

    Channels i and i + D/2 are a point (a, b), which is turned about the origin, from each place to
    the next by f = 10000^(-i / (D/2)) radians: like the hands of a clock. The fast ones tell
    neighbours apart; the slow ones would tell far places, and in 64 bytes hardly turn.

    A query at place m is turned by m f, a key at place n by n f. To turn both by the same angle
    changes nothing in their dot product. If both were turned back by m f, the query would stand as
    it was and the key be turned by (n - m) f: so a score depends on q, k and how far apart they
    are, not on where.
    """
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))  # (T, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class Attention(nn.Module):
    """Looks back: each place takes from itself and earlier ones what it needs.

    Each place has a query q (what it looks for), a key k (by which it is found) and a value v (what
    is taken from it then). The better a key fits a query, the more of its value is taken. H heads
    do so side by side, and can look for H things.
    """

    def __init__(self):
        super().__init__()
        self.wq = matrix(WIDTH, WIDTH)
        self.wk = matrix(WIDTH, WIDTH)
        self.wv = matrix(WIDTH, WIDTH)
        self.wo = matrix(WIDTH, WIDTH, zero=True)  # mixes what the heads found; zero: see Block

    def forward(self, x):
        B, T, C = x.shape
        q = self.wq(x).view(B, T, HEADS, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.wk(x).view(B, T, HEADS, -1).transpose(1, 2)
        v = self.wv(x).view(B, T, HEADS, -1).transpose(1, 2)
        # normed to length sqrt(D), so that a score, below, stays between -sqrt(D) and sqrt(D),
        # however large wq and wk grow: else softmax may end all on one place, where it is flat
        q, k = rotate(norm(q)), rotate(norm(k))
        # two such vectors, taken at random, have a dot product around 0, of size sqrt(D), as a sum
        # of D products of either sign. Undivided, attention would begin hard, seven tenths of it on
        # one place picked by chance, and each small change of q or k would throw it about
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
        self.up = matrix(WIDTH, 4 * WIDTH)  # four times as wide, as in the first Transformer
        self.down = matrix(4 * WIDTH, WIDTH, zero=True)

    def forward(self, x):
        # the non-linearity: without one, both matrices would be no more than a single one. ReLU^2
        # learns a little faster than ReLU (arXiv:2109.08668)
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """First looks, then thinks. What comes of it is added to x, and does not replace it (residual):
    a sum hands the gradient on as it is, so it reaches the first block however many follow.

    `wo` and `down` begin at zero, so nothing is added at first: sums of random blocks would drown
    what the embedding says. They learn all the same, since the gradient of W is its input times
    what comes back from the loss. But nothing comes back through a zero: the first step moves
    `head` alone, the last matrix of the GPT, the second also `wo`, `down` and the embedding, the
    third everything (of the embedding, the bytes that have occurred).
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
        self.wte = nn.Embedding(256, WIDTH)  # the embedding: C numbers for each byte, first random
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = matrix(WIDTH, 256, zero=True)  # at first all logits are equal: ln 256 nats

    def forward(self, tokens):
        x = self.wte(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(norm(x))


# --- learning and writing


def batch_of(tokens):
    """Random windows x of a text, and their targets y: the same moved by one. Both (B, T).

    Some of the text comes twice and some never; dataset.py takes each window once in a round.
    """
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH,)).tolist()
    x = torch.stack([tokens[i : i + CONTEXT] for i in starts])
    y = torch.stack([tokens[i + 1 : i + CONTEXT + 1] for i in starts])
    return x, y


def loss_of(model, x, y):
    """The mean of -ln p(target), in nats: 0 for sure and right, ln 256 = 5.55 for knowing nothing,
    more for sure and wrong. Softmax, inside, makes probabilities of logits: e^logit each, divided
    by their sum."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()  # keeps nothing for a backward(): less memory, and faster
def report(model, step, train_batches, val_batches):
    """Prints the loss on 20,480 bytes that it learns from, and on as many that it does not: few, so
    each is a rough estimate; always the same ones, so that two runs can be compared."""
    train_loss = sum(loss_of(model, x, y).item() for x, y in train_batches) / len(train_batches)
    val_loss = sum(loss_of(model, x, y).item() for x, y in val_batches) / len(val_batches)
    line = f"step {step}: training loss {train_loss:.2f}, validation loss {val_loss:.2f} nats"
    print(f"{line} ({val_loss / math.log(2):.2f} bits a byte; stored plainly, 8)", flush=True)


@torch.no_grad()
def write(model, prompt, count, temperature=0.8):
    """`prompt`, which has a byte at least, and `count` bytes written after it, as text.

    A `temperature` below 1, and above 0, makes what is likely likelier: the likeliest alone soon
    goes in circles, and drawn as they are, unlikely bytes come up often enough to spoil words. For
    each byte the last window is read anew, its places counted from 0: only distances matter.
    generate.py keeps what was read (a KV cache), and pick.py can leave out what is unlikely.
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
    parser.add_argument("--prompt", default="\n", help="what it goes on from in the end")
    library = Path(sysconfig.get_path("stdlib")).glob("*.py")
    args = parser.parse_args(argv)
    files = args.files or sorted(library)
    try:
        text = b"".join(Path(file).read_bytes() for file in files)
    except OSError as error:
        parser.error(f"{error.filename} cannot be read ({error.strerror}): name a text file")
    if len(text) < 20 * CONTEXT:  # the last tenth of it holds about two windows then
        parser.error(f"{len(text)} bytes of text are too few: give it {20 * CONTEXT} at least")

    torch.manual_seed(1)
    tokens = torch.tensor(list(text))
    cut = len(tokens) * 9 // 10
    train, val = tokens[:cut], tokens[cut:]  # val to be tested on: what it has read it may know
    train_batches = [batch_of(train) for _ in range(20)]  # the same for each report
    val_batches = [batch_of(val) for _ in range(20)]

    model = GPT()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{numbers:,} parameters, {len(tokens):,} bytes of text")
    for step in range(STEPS):
        if step % 100 == 0:
            report(model, step, train_batches, val_batches)
        # large steps first, smaller and smaller ones to settle
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        loss_of(model, *batch_of(train)).backward()  # w.grad: how the loss would change with w
        # Adam (arXiv:1412.6980): mean is that of the last ten or so gradients (beta 0.9), square
        # that of the last twenty or so squared (0.95), both corrected for beginning at 0. w moves
        # by -lr * mean / (sqrt(square) + 1e-8): by the rate where these gradients agree, by less
        # where they do not, and not at all where there are none
        optimizer.step()
        optimizer.zero_grad()  # or the next gradient would be added to this one
    report(model, STEPS, train_batches, val_batches)
    print(write(model, args.prompt.encode(errors="surrogateescape") or b"\n", 500))


if __name__ == "__main__":
    main(sys.argv[1:])
