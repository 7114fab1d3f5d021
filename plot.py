"""Loss curves of one or several runs: python plot.py out/small out/other --out=loss.png"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine import settings
from engine.metrics import read_metrics
from engine.settings import BelowOne, Bound

PICTURE = re.compile(r".*\.(png|svg|pdf)")
Picture = Annotated[str, Bound("a name that ends in .png, .svg or .pdf", PICTURE.fullmatch)]
UNITS = {"loss": "loss (nats a token)", "bpb": "bits per byte"}


@dataclass
class Settings:
    runs: tuple = ()  # run folders
    out: Picture = "loss.png"  # picture to write
    x: Literal["tokens", "step", "seconds"] = "tokens"  # horizontal axis
    y: Literal["loss", "bpb"] = "loss"  # vertical axis; bpb compares runs of other vocabularies
    smooth: BelowOne = 0.9  # how much of a point of the training curve comes from its neighbours
    title: str = ""  # above the picture


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Draw loss curves.", "runs", nargs="+")
    curves = {run: (training(run, s), validation(run, s)) for run in s.runs}
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from e
    matplotlib.use("agg")  # draws files, needs no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (run, (trained, evaluated)) in enumerate(curves.items()):
        color = f"C{number}"
        name = f"{run}, training" if s.y == "loss" else f"{run}, training (estimated)"
        axes.plot(*trained, color=color, alpha=0.45, linewidth=1, label=name)
        if evaluated[1]:
            name = f"{run}, validation (best {min(evaluated[1]):.3f})"
            axes.plot(*evaluated, color=color, marker="o", markersize=3.5, label=name)
    axes.set_xlabel(s.x)
    axes.set_ylabel(UNITS[s.y])
    axes.set_title(s.title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(s.out, dpi=130)
    print(f"wrote {s.out}")


def training(run: str, s: Settings) -> tuple[list, list]:
    """The training curve of a run, smoothed: its xs and ys.

    In bits per byte it is an estimate: a row does not say how many bytes its tokens have, and they
    are taken to have as many as those of the validation text.
    """
    rows = [row for row in rows_of(run) if "loss" in row and s.x in row]
    a_nat = 1.0
    if s.y == "bpb":
        known = [row for row in rows_of(run) if row.get("val_bpb")]
        if not known:
            raise ValueError(f"{run} has no bits per byte (val_bpb): draw it with --y=loss")
        a_nat = known[-1]["val_bpb"] / known[-1]["val_loss"]
    return [row[s.x] for row in rows], smoothed([a_nat * row["loss"] for row in rows], s.smooth)


def validation(run: str, s: Settings) -> tuple[list, list]:
    """The evaluations of a run: xs and ys."""
    rows = [row for row in rows_of(run) if row.get(f"val_{s.y}") is not None and s.x in row]
    return [row[s.x] for row in rows], [row[f"val_{s.y}"] for row in rows]


def rows_of(run: str) -> list[dict]:
    rows = read_metrics(Path(run))
    if not rows:
        raise ValueError(f"{run} has no metrics.jsonl with rows: is it the folder of a run?")
    return rows


def smoothed(values: list[float], share: float) -> list[float]:
    """Means over as many neighbours before as behind, fewer towards the ends.

    So a slope stays where it is. A mean over the past alone lags behind a falling loss, and makes
    training look worse than validation.
    """
    widest = round(share / (1 - share))  # the mean age of what a running mean with this share keeps
    means = []
    for i in range(len(values)):
        reach = min(widest, i, len(values) - 1 - i)
        near = values[i - reach : i + reach + 1]
        means.append(sum(near) / len(near))
    return means


if __name__ == "__main__":
    settings.run(main)
