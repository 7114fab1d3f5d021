"""Chapter 12: twelve mistakes, each of them made, and what they look like in numbers."""

import copy
import math
import random
import statistics

import numpy as np
import tiktoken
import torch
from torch.nn.functional import cross_entropy

import generate
from engine.spool import digest_of, draw
from lessons import ablations, require, specimen
from model import GPT
from shape import GPTConfig
from tasks.repeat import BAR, string
from tokenizer import END_OF_TEXT, SPLIT, Tokenizer, bytes_tokenizer

BOOK = "generate"
SEEDS = (1, 2, 3)
ROWS, T = 8, 64
VERSE = "白日依山尽，黄河入海流。"


def windows(step: int, rows: int = ROWS, length: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, (rows, length) each: strings and their copies, new ones at each step."""
    rng, ids = random.Random(step), []
    tokenizer = bytes_tokenizer()
    while len(ids) <= rows * length:
        text = string(rng)
        ids += [tokenizer.end_of_text, *tokenizer.encode(f"{text}{BAR}{text}")]
    ids = torch.tensor(ids[: rows * length + 1])
    return ids[:-1].view(rows, length), ids[1:].view(rows, length)


def made(seed: int = 1, **changes) -> GPT:
    net = GPT(GPTConfig(**dict(vocab_size=257, n_layer=1, n_embd=32) | changes))
    net.init_weights(seed)
    return net


def gradient(net: GPT, x, y, times: float = 1.0) -> torch.Tensor:
    """The gradient of the loss, taken `times` as large, as one long vector."""
    net.zero_grad()
    (times * net(x, y)).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def shown(values, decimals: int = 2) -> str:
    return " ".join(f"{x:.{decimals}f}" for x in values)


# --- learning


def not_zeroed() -> str:
    """One batch by heart with AdamW, three seeds: the loss at every tenth step."""
    last = []
    for zeroed in (True, False):
        last.append([])
        for seed in SEEDS:
            net, losses = made(seed, zero_init=False), []
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            for _ in range(41):
                loss = net(*windows(0, 4, 32))
                loss.backward()
                optimizer.step()
                if zeroed:
                    optimizer.zero_grad()
                losses.append(loss.item())
            last[-1].append(losses[-1])
            print(f"zeroed: {zeroed!s:5}   {shown(losses[::10])}")
    apart = ablations.Found(*last).apart()
    print(f"{apart:.1f} deviations apart")
    return "b" if apart > ablations.BEYOND else "a"


def not_divided() -> float:
    """Eight pieces, whose losses are added up and not divided by eight."""
    x, y = windows(0)
    longer = {}
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        steps = []
        for times in (1, 8):
            net = made(zero_init=False)
            gradient(net, x, y, times)
            before = copy.deepcopy([*net.parameters()])
            kind(net.parameters(), lr=0.01, weight_decay=0).step()
            moved = [(a - b).flatten() for a, b in zip(net.parameters(), before, strict=True)]
            steps.append(torch.cat(moved).norm().item())
        longer[kind.__name__] = steps[1] / steps[0]
        print(f"{kind.__name__:5}  the step is {longer[kind.__name__]:.2f} times as long")
    net, _ = specimen.load()
    norms = [gradient(net, *windows(step)).norm().item() for step in range(20)]
    for times in (1, 8):
        clipped = sum(times * norm > 1 for norm in norms)
        print(f"loss times {times}: clipped at 1 in {clipped} of 20 steps of the specimen")
    return longer["AdamW"]


def one_seed() -> float:
    """How far the gradient of a batch is from that of many windows: of 16 windows, and of four that
    four processes have all drawn."""
    net = made(zero_init=False)
    many = gradient(net, *windows(0, 512, 32))
    noise = {}
    for different in (16, 4):
        off = [gradient(net, *windows(i, different, 32)) - many for i in range(1, 61)]
        noise[different] = math.sqrt(statistics.mean(x.square().sum().item() for x in off))
        print(f"{different:2} different windows: off by {noise[different]:.3f}")
    return noise[4] / noise[16]


def go_on(net: GPT, optimizer, steps: range) -> float:
    """The loss of the last of these steps."""
    for step in steps:
        loss = net(*windows(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def resumed() -> str:
    """The specimen goes on with AdamW, and is stopped; then something is forgotten. Three seeds."""
    losses = dict(nothing=[], moments=[], step=[])
    for seed in SEEDS:
        net, _ = specimen.load()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
        go_on(net, optimizer, range(1000 * seed, 1000 * seed + 10))
        kept = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
        for lost, found in losses.items():
            net.load_state_dict(kept[0])
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
            if lost != "moments":
                optimizer.load_state_dict(copy.deepcopy(kept[1]))
            if lost == "step":  # and so the rate is what it was at first
                optimizer.param_groups[0]["lr"] = 0.03
            found.append(go_on(net, optimizer, range(1000 * seed + 10, 1000 * seed + 15)))
    for lost, found in losses.items():
        print(f"{lost:8} forgotten: loss at the fifth step {shown(found)}")
    apart = [ablations.Found(losses["nothing"], losses[k]).apart() for k in ("moments", "step")]
    print(f"moments {apart[0]:.1f}, step {apart[1]:.1f} deviations apart from nothing")
    return "b" if apart[1] > ablations.BEYOND > apart[0] else "a"


# --- judging


def not_eval() -> str:
    """The specimen, after some steps with dropout: its loss, three times over, in each mode."""
    net, _ = specimen.load()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=0.003)
    go_on(net, optimizer, range(40))
    losses = {}
    for mode in ("train", "eval"):
        net.train(mode == "train")
        with torch.no_grad():
            losses[mode] = [net(*windows(1000)).item() for _ in range(3)]
        print(f"net.{mode}(): {shown(losses[mode], 4)}")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        net(*windows(1000))
    print(f"kept for a backward pass without no_grad(): {sum(kept) / 1e6:.1f} MB; with it: 0")
    worse = min(losses["train"]) > max(losses["eval"])
    again = [len({*losses[mode]}) == 1 for mode in ("train", "eval")]
    return "b" if worse and again == [False, True] else "a"


@torch.no_grad()
def other_tokenizer() -> float:
    """The specimen reads what a vocabulary of as many tokens wrote, in another order."""
    net, ours = specimen.load()
    ranks = {bytes([byte]): (byte + 100) % 256 for byte in range(256)}
    special = {END_OF_TEXT: 256}
    encoding = tiktoken.Encoding(
        "other", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special
    )
    theirs = Tokenizer("bpe", encoding, None)
    losses = []
    for tokenizer in (ours, theirs):
        tokens = specimen.read(tokenizer, "nutshell|nutshell")
        losses.append(specimen.surprise(net, tokens).mean().item())
        said = tokenizer.decode(net(tokens)[0].argmax(-1).tolist())
        print(f"V = {tokenizer.vocab_size}   loss {losses[-1]:5.2f}   says {said!r}")
    print(f"ln V = {math.log(257):.2f}   digests {ours.digest()[:8]} {theirs.digest()[:8]}")
    print("theirs extends ours:", theirs.extends(ours))
    return losses[1]


@torch.no_grad()
def removed() -> float:
    """The prompt has no loss; what if it is taken out of the input as well?"""
    net, tokenizer = specimen.load()
    found = []
    for text in ("nutshell|nutshell", "|nutshell"):
        nats = specimen.surprise(net, specimen.read(tokenizer, text))[-8:]
        found.append(nats.mean().item())
        print(f"{text:18} nats a letter behind the bar {found[-1]:.2f}   {shown(nats.tolist())}")
    return found[1]


def duplicates() -> float:
    """Of 3,000 lines, each there once, twice or three times, a tenth is held back."""
    rng = random.Random(0)
    texts = [f"passage {i}" for i in range(1500) for _ in range(rng.randint(1, 3))]
    rng.shuffle(texts)
    cut = len(texts) // 10
    ways = {
        "lines shuffled, then cut": [i < cut for i in range(len(texts))],
        "by a digest of the text": [draw(digest_of(text), 1) < 0.1 for text in texts],
    }
    shares = []
    for way, held in ways.items():
        train = {text for text, back in zip(texts, held, strict=True) if not back}
        val = [text for text, back in zip(texts, held, strict=True) if back]
        shares.append(100 * sum(text in train for text in val) / len(val))
        print(f"{way:25} {shares[-1]:5.1f}% of {len(val)} lines of val are in train, too")
    return shares[0]


def eight_bits(w: torch.Tensor, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127, and the scale by which to multiply them."""
    largest = w.abs().amax(dim=1, keepdim=True) if by_row else w.abs().max()
    scale = largest / 127
    return (w / scale).round(), scale


@torch.no_grad()
def one_scale() -> float:
    """A matrix of the specimen, with one weight made 100 times as large as the largest."""
    net, _ = specimen.load()
    w = net.blocks[0].attn.wv.weight
    w[3, 5] = 100 * w.abs().max()
    zeros = []
    for by_row in (False, True):
        q, _ = eight_bits(w, by_row)
        zeros.append(100 * (q == 0).float().mean().item())
        rows = int((q == 0).all(dim=1).sum())
        name = "one for each row" if by_row else "one for the matrix"
        print(f"scale: {name:19} {zeros[-1]:5.1f}% of the weights are 0, {rows} rows of {len(w)}")
    cache = net.new_cache()
    print(f"weights in eight bits: {w.numel() + 4 * len(w):,} bytes instead of {w.nbytes:,}")
    print(f"the KV cache before and after: {cache.k.nbytes + cache.v.nbytes:,} bytes")
    return zeros[0]


def best_of_20() -> float:
    """Twenty models, equally good: each answers a row rightly with probability 0.8."""
    rng = np.random.default_rng(0)
    scores = rng.binomial(200, 0.8, size=(10_000, 20)) / 2  # percent of 200 rows
    for count in (1, 5, 20):
        best = scores[:, :count].max(axis=1).mean()
        print(f"best of {count:2}: {best:.1f}%, {best - 80:+.1f} points")
    print(f"one model, 95%: 80 ± {196 * math.sqrt(0.8 * 0.2 / 200):.1f} points")
    return scores.max(axis=1).mean() - 80


def alone() -> int:
    """Each token shown by itself, and as generate.py shows it."""
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(VERSE)
    stream = generate.TextStream(tokenizer)
    by_itself = "".join(tokenizer.decode([i]) for i in ids)
    print(f"{len(ids)} tokens, each by itself: {by_itself}")
    print("held back until whole:   ", "".join(map(stream.feed, ids)))
    return by_itself.count("\ufffd")


def chains(count: int, seed: int) -> torch.Tensor:
    """Letters of which each is the next in the alphabet of eight, but for a quarter that are drawn;
    (count, 13)."""
    rng = torch.Generator().manual_seed(seed)
    letters = torch.randint(8, (count, 13), generator=rng)
    chance = torch.rand(count, 13, generator=rng)
    for i in range(1, 13):
        follow = chance[:, i] < 0.75
        letters[follow, i] = (letters[follow, i - 1] + 1) % 8
    return letters


def sure_and_wrong() -> str:
    """Sixteen texts, read again and again, three seeds; judged by 500 others."""
    found = dict(loss=[[], []], right=[[], []])
    for seed in SEEDS:
        few, others = chains(16, seed), chains(500, 0)
        net = made(seed, vocab_size=8)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for step in range(1, 121):
            learned = net(few[:, :-1], few[:, 1:])
            learned.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step not in (30, 120):
                continue
            with torch.no_grad():
                logits, targets = net(others[:, :-1]).flatten(0, 1), others[:, 1:].flatten()
            loss = cross_entropy(logits, targets).item()
            right = 100 * (logits.argmax(-1) == targets).float().mean().item()
            found["loss"][step > 30].append(loss)
            found["right"][step > 30].append(right)
            print(f"step {step:3}   loss {learned:.2f}   val_loss {loss:.2f}   right {right:.1f}%")
    apart = {name: ablations.Found(*runs).apart() for name, runs in found.items()}
    print(", ".join(f"{name} {x:.1f}" for name, x in apart.items()), "deviations apart")
    return "b" if apart["loss"] > ablations.BEYOND > abs(apart["right"]) else "a"


QUESTIONS = (not_zeroed, not_divided, one_seed, resumed, not_eval, other_tokenizer, removed)
QUESTIONS += (duplicates, one_scale, best_of_20, alone, sure_and_wrong)


# --- checks


def bytes_become_text():
    """What the stream of generate.py shows is the text, and never half a character."""
    tokenizer = bytes_tokenizer()
    stream = generate.TextStream(tokenizer)
    pieces = [*map(stream.feed, tokenizer.encode(VERSE)), stream.end()]
    require("".join(pieces) == VERSE, f"of {VERSE!r} it makes {''.join(pieces)!r}")


def quantize(function):
    """Exercise 12.a: quantize(w): whole numbers from -127 to 127, and a scale for each row."""
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    w[1, 2] = 500.0
    q, scale = function(w)
    require(q.dtype == torch.int8, f"the numbers are {q.dtype}, and should be torch.int8")
    off = ((q.float() * scale - w).abs() / w.abs().amax(dim=1, keepdim=True)).max().item()
    least = 1 / 254  # half a step of 127
    require(off < 1.01 * least, f"off by {off:.4f} of a row's largest weight: {least:.4f} will do")


def pieces(function):
    """Exercise 12.b: pieces(parts): the bytes of each token to the text to show after it."""
    parts = [bytes([byte]) for byte in "é天x".encode()]
    found = list(function(parts))
    wanted = ["", "é", "", "", "天", "x"]
    require(found == wanted, f"pieces is {found}, and should be {wanted}")


CHECKS = (bytes_become_text, quantize, pieces)
