"""The pictures of docs/learn: what each shows, computed by the code that its chapter explains; and
that of docs/scaling.md.

    python -m lessons.pictures              redraws all of docs/learn/pictures, and page.html
    python -m lessons.pictures rotary       this one

A picture is two functions of one name: here the one that returns its numbers, in lessons/drawing.py
the one that draws them. An SVG carries its numbers with it (`kept`), so that a test can compare
them with those of today: when the code changes, it tells which pictures are out of date. Labels are
symbols and names of the code, which need no translation.

`docs/learn/pictures/specimen.jsonl` is what training the specimen has written down (metrics.jsonl);
the digest in specimen/state.json vouches for it.
"""

import json
import math
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

import bpe
import dataset
import model
import optim
import pick
from engine import settings
from engine.files import atomic_file
from lessons import PAGES, blocks, live, scaling, specimen, tokens, writing
from shape import GPTConfig
from tasks import repeat
from tokenizer import bytes_tokenizer

FOLDER = PAGES / "pictures"
DIGITS = 4  # of the numbers that a picture keeps


def kept(path: Path) -> dict:
    """The numbers that an SVG was drawn from."""
    found = ElementTree.parse(path).find("{http://www.w3.org/2000/svg}metadata")
    return json.loads(found.text)


def rounded(x):
    """Numbers as a picture keeps them: with a few significant digits, tensors as lists."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x


def shown(tokenizer, ids) -> list[str]:
    """Tokens of the specimen as single signs; end-of-text is a point."""
    return ["·" if i == tokenizer.end_of_text else chr(i) for i in ids]


# --- chapters 0 to 3


def surprise() -> dict:
    """-ln p of each token of a line, end-of-text included, read by the specimen."""
    net, tokenizer = specimen.load()
    line = [specimen.read(tokenizer, text) for text in ("nutshell|nutshell", "")]
    read = torch.cat(line, dim=1)
    names = shown(tokenizer, read[0, 1:].tolist())
    return dict(tokens=names, nats=specimen.surprise(net, read), least=math.log(26))


def block() -> dict:
    """Shapes behind the parts of one block of the default shape, for six tokens."""
    net = model.GPT(GPTConfig(vocab_size=2048))
    net.init_weights(seed=1)
    shapes: dict = {}
    for name in ("wte", "attn_norm", "wq", "attn.drop", "wo", "mlp_norm", "up", "down", "head"):
        found = next(m for n, m in net.named_modules() if n.endswith(name))
        found.register_forward_hook(lambda _, x, y, n=name: shapes.update({n: [*y.shape]}))
    with torch.no_grad():
        net(torch.arange(6)[None])
    return dict(shapes=shapes, blocks=len(net.blocks), heads=net.config.n_head)


def merges() -> dict:
    """Words as tokens (hex) before and after each merge of chapter 1."""
    count = 4
    vocabulary = bpe.slow_bpe(tokens.WORDS, 257 + count)
    states = []
    for size in range(count + 1):
        tokenizer = bpe.bpe_tokenizer(tokens.WORDS, 257 + size)
        ids = {word: tokenizer.encode(word) for word in tokens.WORDS}
        states.append({w: [tokenizer.decode_bytes([i]).hex() for i in x] for w, x in ids.items()})
    new = [token.hex() for token in vocabulary[256:]]
    return dict(words=dict(tokens.WORDS), states=states, new=new)


def windows() -> dict:
    """Where the windows of two epochs begin, in the order in which they are learned from."""
    size, length = 20, 4
    orders = [dataset.epoch_order(size, length, 5, epoch) for epoch in range(2)]
    return dict(tokens=size, T=length, starts=[order.tolist() for order in orders])


# --- chapters 4 to 6


def attention() -> dict:
    """The weights of every head of the specimen: (layers, heads, T, T)."""
    net, tokenizer = specimen.load()
    read = specimen.read(tokenizer, "nutshell|nutsh")
    mask = model.causal_mask(read.size(1), read.size(1))
    weights = (100 * specimen.attention(net, read)).round().int()
    return dict(tokens=shown(tokenizer, read[0].tolist()), percent=weights, mask=mask.int())


def rotary() -> dict:
    """Pairs of channels turned by their position, and q . k against distance, for q = k."""
    positions = torch.arange(64)
    scores, turned = {}, None
    for base in (100, 10_000):
        c = GPTConfig(vocab_size=1, n_embd=32, n_head=4, rope_base=base)
        x = torch.cat((torch.ones(4), torch.zeros(4))).expand(1, 64, 1, 8)  # four pairs (1, 0)
        pairs = model.rotate(x, model.rotary(positions, c))[0, :, 0]  # (64, 8)
        scores[str(base)] = pairs @ pairs[0]
        if base == 100:  # as in the specimen
            turned = torch.stack((pairs[:8, :4], pairs[:8, 4:]), -1).transpose(0, 1)
    return dict(turned=turned, scores=scores)


@torch.no_grad()
def lens() -> dict:
    """What norm and head would say behind the embedding and behind each block: the likeliest
    token and its probability, at each position. What is hardly likelier than others has no name."""
    net, tokenizer = specimen.load()
    seen: list = []
    for module in (net.embed_norm, *net.blocks):
        module.register_forward_hook(lambda _, x, y: seen.append(y))
    read = specimen.read(tokenizer, "quick|quick")
    net(read)
    p, best = torch.stack([net.logits(net.norm(x))[0] for x in seen]).softmax(-1).max(-1)
    said = [shown(tokenizer, row) for row in best.masked_fill(p < 0.02, ord(" ")).tolist()]
    return dict(tokens=shown(tokenizer, read[0].tolist()), said=said, p=p)


# --- chapters 7 and 8


def rates() -> dict:
    """Rate and loss of the run that made the specimen."""
    lines = (FOLDER / "specimen.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "lr" in row]
    s = json.loads((specimen.FOLDER / "state.json").read_text(encoding="utf-8"))["settings"]
    shape = (s["steps"], s["warmup"], s["decay"], s["final_lr"], s["schedule"])
    steps = [row["step"] for row in rows]
    rate = [s["lr"] * optim.learning_rate(step - 1, *shape) for step in steps]
    return dict(step=steps, rate=rate, loss=[row["loss"] for row in rows])


def muon() -> dict:
    """Singular values of the first gradient of a matrix, before and after Muon's five rounds."""
    net, tokenizer = blocks.made(zero_init=False), bytes_tokenizer()
    lines = [row["text"] for row in islice(repeat.rows("test", 0), 100)]
    ids = [i for text in lines for i in (tokenizer.end_of_text, *tokenizer.encode(text))]
    read = torch.tensor(ids[: 16 * 65]).view(16, 65)
    net(read[:, :-1], read[:, 1:]).backward()
    g = net.blocks[1].attn.wo.weight.grad[None]  # (1, 32, 32)
    values = [torch.linalg.svdvals(x)[0] for x in (g / g.norm(), optim.orthogonalise(g))]
    return dict(before=values[0], after=values[1])


def chances() -> dict:
    """With which probability three tokens come, by temperature and top-p."""
    ways = (dict(temperature=0.5), dict(temperature=1.0), dict(temperature=2.0), dict(top_p=0.9))
    found = [pick.probabilities(writing.LOGITS, **way)[0] for way in ways]
    names = [f"{name}={value:g}" for way in ways for name, value in way.items()]
    return dict(logits=writing.LOGITS[0], p=dict(zip(names, found, strict=True)))


def cache() -> dict:
    """Which positions pass through the first block in each pass, without a cache and with one."""
    net, tokenizer = specimen.load()
    prompt = specimen.read(tokenizer, "quick|")[0].tolist()
    sizes: list = []
    net.blocks[0].register_forward_pre_hook(lambda _, x: sizes.append(x[0].size(1)))
    text = writing.plainly(net, prompt, 5)
    without, sizes[:] = [*sizes], []
    again = [t for (t,) in writing.generate.generate(net, prompt, 5, temperature=0)]
    assert text == again, "the cache must not change the text"
    return dict(tokens=shown(tokenizer, [*prompt, *text]), without=without, with_cache=sizes)


# --- docs/scaling.md


def isoflop() -> dict:
    """Runs of each budget of operations, and the curve through those up to FITTED: loss over N, and
    the least loss over operations."""
    runs, _ = scaling.read()
    curve, *_ = scaling.curves(runs)
    known = np.array(sorted((scaling.parameters(*x), scaling.cost(*x)) for x in scaling.KNOWN)).T
    N = np.geomspace(*known[0, [0, -1]], 24)
    every = np.geomspace(min(runs) / 2, max(runs) * 2, 12)
    return dict(
        budgets=[*runs],
        runs=[columns[[2, 4]].tolist() for columns in runs.values()],
        fitted=scaling.FITTED,
        N=N.tolist(),
        curves=[scaling.at(curve, N, x / np.interp(N, *known)).tolist() for x in runs],
        every=every.tolist(),
        least=[scaling.lowest(curve, x)[-1] for x in every],
    )


CHAPTERS = {0: (surprise, block), 1: (merges,), 2: (windows,), 3: (block,), 4: (attention,)}
CHAPTERS |= {5: (rotary,), 6: (lens,), 7: (rates, muon), 8: (chances, cache)}
PICTURES = {f.__name__: f for functions in CHAPTERS.values() for f in functions}
PICTURES |= {isoflop.__name__: isoflop}


def main(argv: list[str]) -> None:
    names = (*PICTURES, live.PAGE.stem)
    for name in argv:
        if name not in names:
            raise ValueError(f"there is no picture {name!r:.60}: there are {', '.join(names)}")
    settings.require_package("matplotlib", True)
    from lessons import drawing

    torch.set_num_threads(1)
    for name in argv or names:
        drawn = name in PICTURES
        path = FOLDER / f"{name}.svg" if drawn else live.PAGE
        text = drawing.picture(name, rounded(PICTURES[name]())) if drawn else live.content()
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
        print(f"wrote {path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    settings.run(main)
