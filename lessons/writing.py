"""Chapter 8: temperature, top-k and top-p by counting draws; the cache by counting positions."""

import torch

import generate
import pick
from lessons import require, specimen
from model import GPT
from shape import GPTConfig
from tasks.repeat import BAR

BOOK = "pick"
LOGITS = torch.tensor([[2.0, 1.0, 0.0]])
EVENLY = 100_000  # draws, by numbers evenly spread over [0, 1): frequencies are then probabilities


def frequencies(picker, logits, **options) -> list[float]:
    uniform = (torch.arange(EVENLY, dtype=torch.float64) + 0.5) / EVENLY
    token = picker(logits.expand(EVENLY, -1), uniform, **options)
    return (torch.bincount(token, minlength=logits.size(-1)) / EVENLY).tolist()


def shown(name: str, found: list[float]) -> None:
    print(f"{name:18}", " ".join(f"{p:.3f}" for p in found))


def colder() -> float:
    for temperature in (1.0, 0.5, 2.0):
        found = frequencies(pick.pick, LOGITS, temperature=temperature)
        shown(f"temperature={temperature}", found)
    return frequencies(pick.pick, LOGITS, temperature=0.5)[0]


def nucleus() -> float:
    shown("top_p=1", frequencies(pick.pick, LOGITS))
    shown("top_p=0.9", frequencies(pick.pick, LOGITS, top_p=0.9))
    shown("top_k=2", frequencies(pick.pick, LOGITS, top_k=2))
    shown("top_k=1", frequencies(pick.pick, LOGITS, top_k=1))
    return frequencies(pick.pick, LOGITS, top_p=0.9)[0]


class Counted:
    """Within, `positions` counts those that pass through the first block of a model."""

    def __init__(self, net):
        self.net, self.positions = net, 0

    def __enter__(self):
        block = self.net.blocks[0]
        self.hook = block.register_forward_pre_hook(lambda _, x: self.count(x[0]))
        return self

    def count(self, x) -> None:
        self.positions += x.shape[0] * x.shape[1]

    def __exit__(self, *_):
        self.hook.remove()


@torch.no_grad()
def plainly(net, prompt: list[int], count: int) -> list[int]:
    """Greedy without a cache: the five lines at the top of generate.py."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        tokens = torch.cat((tokens, net(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens[0, len(prompt) :].tolist()


def positions() -> int:
    net, tokenizer = specimen.load()
    prompt = specimen.read(tokenizer, "quick|")[0].tolist()  # 7 tokens
    with Counted(net) as slow:
        one = plainly(net, prompt, 5)
    with Counted(net) as fast:
        other = [t for (t,) in generate.generate(net, prompt, 5, temperature=0)]
    print(f"without a cache {tokenizer.decode(one)!r}   positions {slow.positions}")
    print(f"with a cache    {tokenizer.decode(other)!r}   positions {fast.positions}")
    return fast.positions


def memory() -> int:
    config = GPTConfig(vocab_size=2048, block_size=128)  # the default shape, 4 layers
    cache = GPT(config).new_cache()
    print("k", tuple(cache.k.shape), " v", tuple(cache.v.shape), cache.k.dtype)
    return cache.k.nbytes + cache.v.nbytes


def greedy() -> float:
    """Letters in a line that the specimen writes on its own, cold and warm."""
    net, tokenizer = specimen.load()
    end, letters = tokenizer.end_of_text, 0.0
    for temperature in (1.0, 0.0):
        new = [t for (t,) in generate.generate(net, [end], 400, seed=1, temperature=temperature)]
        lines = "".join("\n" if t == end else chr(t) for t in new).split("\n")[:-1]
        letters = sum(line.index(BAR) for line in lines) / len(lines)
        print(f"temperature={temperature}   {letters:.1f} letters a line   ", *lines[:3])
    return letters


QUESTIONS = (colder, nucleus, positions, memory, greedy)


# --- checks


def greedy_is_the_likeliest():
    """At temperature 0, and with top_k=1, the likeliest token comes, whatever is drawn."""
    for options in (dict(temperature=0.0), dict(top_k=1)):
        found = frequencies(pick.pick, LOGITS, **options)
        require(found == [1, 0, 0], f"with {options} the tokens come up {found}, and not 1 0 0")


def min_p(function):
    """Exercise 8.a: min_p(logits, uniform, p): of tokens at least p times as likely as the best."""
    logits = torch.tensor([[0.50, 0.30, 0.15, 0.05]]).log()
    for p, wanted in (
        (0.2, [0.526, 0.316, 0.158, 0]),
        (0.5, [0.625, 0.375, 0, 0]),
        (1, [1, 0, 0, 0]),
    ):
        found = frequencies(function, logits, p=p)
        off = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        said = " ".join(f"{x:.3f}" for x in found)
        require(off < 0.002, f"for p={p} the tokens come up {said} of the time, not {wanted}")
    shuffled = frequencies(function, logits[:, [2, 0, 3, 1]], p=0.5)
    require(shuffled[1] > shuffled[3] > 0, "in another order of the tokens others come up")


def write(function):
    """Exercise 8.b: write(net, prompt, count): greedy, and no position twice through the layers."""
    net, tokenizer = specimen.load()
    prompt = specimen.read(tokenizer, "nutshell|")[0].tolist()
    wanted = plainly(net, prompt, 8)
    with Counted(net) as counted:
        found = list(function(net, prompt, 8))
    mine, theirs = map(tokenizer.decode, (found, wanted))
    require(found == wanted, f"it writes {mine!r}, and should write {theirs!r}")
    seen, least = counted.positions, len(prompt) + 7
    require(seen <= least, f"{seen} positions passed through the first block; {least} are enough")


CHECKS = (greedy_is_the_likeliest, min_p, write)
