"""Chapter 12, first half: mistakes in learning, each of them made."""

import copy
import math
import random
import statistics

import torch

from lessons import ablations, specimen
from model import GPT
from shape import GPTConfig
from tasks.repeat import BAR, string
from tokenizer import bytes_tokenizer

SEEDS = (1, 2, 3)
ROWS, T = 8, 64


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
    batch, last = windows(0, 4, 32), []
    for zeroed in (True, False):
        last.append([])
        for seed in SEEDS:
            net, losses = made(seed, zero_init=False), []
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            for _ in range(41):
                loss = net(*batch)
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
    losses = {"nothing forgotten": [], "moments forgotten": [], "step forgotten": []}
    for seed in SEEDS:
        net, _ = specimen.load()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
        go_on(net, optimizer, range(1000 * seed, 1000 * seed + 10))
        kept = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
        for lost, found in losses.items():
            net.load_state_dict(kept[0])
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
            if "moments" not in lost:
                optimizer.load_state_dict(copy.deepcopy(kept[1]))
            if "step" in lost:  # and so the rate is what it was at first
                optimizer.param_groups[0]["lr"] = 0.03
            found.append(go_on(net, optimizer, range(1000 * seed + 10, 1000 * seed + 15)))
    for lost, found in losses.items():
        print(f"{lost + ':':18} loss at the fifth step {shown(found)}")
    whole, *others = losses.values()
    apart = [ablations.Found(whole, other).apart() for other in others]
    print(f"moments {apart[0]:.1f}, step {apart[1]:.1f} deviations apart from nothing")
    return "b" if apart[1] > ablations.BEYOND > apart[0] else "a"
