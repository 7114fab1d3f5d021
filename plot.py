"""Loss curves of one or several runs: python plot.py out/small out/other --out=loss.png"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import settings
from engine.metrics import read_metrics
from engine.settings import BelowOne

UNITS = {"loss": "loss (nats a token)", "bpb": "bits per byte"}


@dataclass
class Settings:
    runs: tuple = ()  # run folders
    out: settings.Picture = "loss.png"  # picture to write
    x: Literal["tokens", "step", "seconds"] = "tokens"  # horizontal axis
    y: Literal["loss", "bpb"] = "loss"  # vertical axis; bpb compares runs of other vocabularies
    smooth: BelowOne = 0.9  # how much of a point of the training curve comes from its neighbours
    title: str = ""  # above the picture


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Draw loss curves.", "runs", nargs="+")
    settings.require(s.out, s, "out", "the name of a picture")
    curves = {run: (training(run, s), curve(run, f"val_{s.y}", s)) for run in s.runs}
    settings.require_package("matplotlib", True)
    from matplotlib.figure import Figure  # without pyplot, which would ask for a screen

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (run, (trained, evaluated)) in enumerate(curves.items()):
        color = f"C{number}"
        name = f"{run}, training" + (" (estimated)" if s.y == "bpb" else "")
        axes.plot(*trained, color=color, alpha=0.45, linewidth=1, label=name)
        if evaluated[1]:
            name = f"{run}, validation (best {min(evaluated[1]):.3f})"
            axes.plot(*evaluated, color=color, marker="o", markersize=3.5, label=name)
    axes.set(xlabel=s.x, ylabel=UNITS[s.y], title=s.title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(s.out, dpi=130)
    print(f"wrote {s.out}")


def curve(run: str, key: str, s: Settings) -> tuple[list, list]:
    """What the rows of a run say of `key`: xs and ys."""
    rows = read_metrics(Path(run))
    if not rows:
        raise ValueError(f"{run} has no metrics.jsonl with rows: is it the folder of a run?")
    rows = [row for row in rows if row.get(key) is not None and s.x in row]
    return [row[s.x] for row in rows], [row[key] for row in rows]


def training(run: str, s: Settings) -> tuple[list, list]:
    """The training curve of a run, smoothed.

    In bits per byte it is an estimate: a row does not say how many bytes its tokens have, and they
    are taken to have as many as those of the validation text.
    """
    xs, ys = curve(run, "loss", s)
    if s.y == "bpb":
        _, bits = curve(run, "val_bpb", s)
        _, nats = curve(run, "val_loss", s)
        if not bits:
            raise ValueError(f"{run} has no bits per byte (val_bpb): draw it with --y=loss")
        ys = [y * bits[-1] / nats[-1] for y in ys]
    return xs, smoothed(ys, s.smooth)


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
