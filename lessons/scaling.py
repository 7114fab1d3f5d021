"""Equal compute, unequal sizes: what more parameters bring, and what more text: docs/scaling.md.

    python -m lessons.scaling data/python    makes its runs, and writes docs/scaling.jsonl
    python -m lessons.scaling                prints its tables from that file

A run learns from as many tokens as its budget of operations pays for. The curve of plan.py goes
through the runs of the budgets up to `FITTED`; what it says of the others is a prediction. What was
interrupted goes on where it stood.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import plan
from engine import settings
from engine.arithmetic import products
from engine.files import atomic_file
from lessons import ROOT
from shape import GPTConfig

RUNS = ROOT / "docs" / "scaling.jsonl"
VOCABULARY, CONTEXT, BATCH = 2048, 256, 1024  # in tokens
# of all runs; config/small.py has others since
SETTINGS = dict(lr=0.02, weight_decay=0.0, qkv_bias="false", logit_cap=15.0)
FITTED = 1e12  # operations
BUDGETS = {  # and the sizes, layers and width, of their runs
    1e11: ((1, 16), (1, 32), (2, 64)),
    3e11: ((1, 16), (1, 32), (2, 64), (3, 96)),
    1e12: ((1, 32), (2, 64), (3, 96), (4, 128)),
    3e12: ((2, 64), (3, 96), (4, 128)),
    5e12: ((9, 288),),
}
# does one rate suit all sizes, and how much is chance? Size, budget, what is different
OTHERS = [(2, 64, 3e11, {name: x}) for name, x in (("lr", 0.01), ("lr", 0.04), ("seed", 2))]
KNOWN = sorted({size for sizes in BUDGETS.values() for size in sizes})


def shape(layers: int, width: int) -> GPTConfig:
    heads = max(1, width // 32)
    return GPTConfig(VOCABULARY, CONTEXT, n_layer=layers, n_head=heads, n_embd=width)


def cost(layers: int, width: int, context: int = CONTEXT) -> float:
    """Operations of a token."""
    return products(shape(layers, width), context)


def parameters(layers: int, width: int) -> float:
    """N: those of products, which are all but the embedding."""
    return cost(layers, width, 0) / 6


def short(budget: float) -> str:
    return f"{budget:.0e}".replace("+", "")


def make(data: str) -> None:
    """All runs, in out/scaling; what they come to is written into RUNS."""
    rows = []
    plain = [(*size, budget, {}) for budget, sizes in BUDGETS.items() for size in sizes]
    for layers, width, budget, other in plain + OTHERS:
        words = "".join(f"--{name}={value}" for name, value in other.items())
        out = Path("out", "scaling", f"{short(budget)}-{layers}x{width}{words}")
        c, steps = shape(layers, width), round(budget / cost(layers, width) / BATCH)
        names = ("block_size", "n_layer", "n_head", "n_embd")
        argv = [f"--{name}={getattr(c, name)}" for name in names]
        argv += [f"--{name}={steps}" for name in ("steps", "eval_every", "save_every")]
        argv += [f"--batch_tokens={BATCH}", f"--data={data}", f"--out={out}", "--sample_tokens=0"]
        argv += [f"--{name}={value}" for name, value in (SETTINGS | other).items()]
        command = [sys.executable, ROOT / "train.py", ROOT / "config" / "small.py", *argv]
        status = subprocess.run(command).returncode
        if status:
            raise SystemExit(status)  # train.py has said why
        *_, last = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        found = {name: round(last[name], 4) for name in ("val_loss", "val_bpb")}
        row = dict(layers=layers, width=width, budget=budget, tokens=steps * BATCH)
        rows.append(row | other | found)
    with atomic_file(RUNS) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read() -> tuple[dict[float, np.ndarray], list[dict]]:
    """Of each budget the runs in columns: layers, width, N, D, loss, bits per byte. And OTHERS."""
    rows = [*map(json.loads, RUNS.read_text(encoding="utf-8").splitlines())]
    others = [row for row in rows if {"lr", "seed"} & {*row}]
    found: dict = {}
    for row in rows:
        if row not in others:
            size = row["layers"], row["width"]
            run = (*size, parameters(*size), row["tokens"], row["val_loss"], row["val_bpb"])
            found.setdefault(row["budget"], []).append(run)
    return {budget: np.array(runs).T for budget, runs in found.items()}, others


# --- what follows from them


def curves(runs: dict[float, np.ndarray]) -> list[tuple]:
    """E, A, a, B, b through the runs up to FITTED, and through all of these but each one."""
    fitted = [columns[2:5] for budget, columns in runs.items() if budget <= FITTED]
    used = np.concatenate(fitted, axis=1)
    less = [np.delete(used, i, axis=1) for i in range(used.shape[1])]
    return [plan.fit(*columns) for columns in (used, *less)]


def at(curve: tuple, N, D):
    E, A, a, B, b = curve
    return E + A / N**a + B / D**b


def lowest(curve: tuple, budget: float) -> tuple[float, float, float]:
    """N and D that the curve has lowest at that budget, and the loss there."""
    known = [(parameters(*size), cost(*size)) for size in KNOWN]
    N = np.geomspace(known[0][0], known[-1][0], 2000)
    D = budget / np.interp(N, *zip(*known, strict=True))
    losses = at(curve, N, D)
    best = losses.argmin()
    return float(N[best]), float(D[best]), float(losses[best])


def valley(N: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """Where the parabola through the losses of one budget, over ln N, is lowest: N, and the loss
    (arXiv:2203.15556, section 3.2)."""
    x = np.log(N)
    a, b, c = np.polyfit(x - x.mean(), loss, 2)
    return float(np.exp(x.mean() - b / 2 / a)), float(c - b * b / 4 / a)


def tables(runs: dict[float, np.ndarray], others: list[dict]):
    """The lines of the page that have numbers."""
    words, (curve, *less) = plan.words, curves(runs)
    E, A, a, B, b = curve
    yield f"    loss = {E:.3f} + {A:.4g} / N^{a:.3g} + {B:.4g} / D^{b:.3g}\n"
    yield "| operations | layers x width | with embedding | N | D | loss | bits | curve | off by |"
    yield "|" + "---|" * 9
    for budget, columns in runs.items():
        for layers, width, N, D, loss, bits in columns.T:
            said = [at(c, N, D) for c in (curve, *less)]
            whole = shape(int(layers), int(width)).parameters()
            cells = [short(budget), f"{layers:.0f} x {width:.0f}", words(whole), words(N)]
            cells += [words(D), f"{loss:.4f}", f"{bits:.4f}"]
            unseen = f" ({min(said):.3f} to {max(said):.3f})" if budget > FITTED else ""
            cells += [f"{said[0]:.4f}{unseen}", f"{loss - said[0]:+.4f}"]
            yield f"| {' | '.join(cells)} |"
    yield "\n| operations | best N, of the runs | loss | N, of the curve | D | loss | D / N |"
    yield "|" + "---|" * 7
    found = {}
    for budget, (_, _, N, _, loss, _) in runs.items():
        if len(N) < 3:
            continue
        found[budget], _ = valley(N, loss)
        (near, least), (far, D, said) = valley(N, loss), lowest(curve, budget)
        cells = [short(budget), words(near), f"{least:.3f}", words(far), words(D), f"{said:.3f}"]
        yield f"| {' | '.join(cells)} | {D / far:.3g} |"
    growth, _ = np.polyfit(np.log([*found]), np.log([*found.values()]), 1)
    yield f"\n    best N of the runs: as operations^{growth:.2f}\n"
    yield "| operations | layers x width | changed | loss | without |"
    yield "|" + "---|" * 5
    for row in others:
        layers, _, _, _, loss, _ = runs[row["budget"]]
        without = loss[layers == row["layers"]][0]
        changed = next(f"`--{name}={row[name]}`" for name in ("lr", "seed") if name in row)
        cells = [short(row["budget"]), f"{row['layers']} x {row['width']}", changed]
        yield f"| {' | '.join(cells)} | {row['val_loss']:.4f} | {without:.4f} |"


def main(argv: list[str]) -> None:
    if argv:
        make(argv[0])
    print(*tables(*read()), sep="\n")


if __name__ == "__main__":
    settings.run(main)
