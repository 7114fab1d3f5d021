"""Loss curves of one or several runs: python plot.py out/small out/other --out=loss.png"""

from dataclasses import dataclass
from pathlib import Path

from engine import settings
from engine.metrics import read_metrics


@dataclass
class Settings:
    runs: tuple = ()  # run folders
    out: str = "loss.png"  # picture to write
    x: str = "tokens"  # horizontal axis: tokens, step or seconds
    smooth: float = 0.9  # the training curve is a running mean that keeps this share of itself
    title: str = ""  # above the picture


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Draw loss curves.", "runs", nargs="+")
    settings.check(
        s,
        ("x", "tokens, step or seconds", s.x in ("tokens", "step", "seconds")),
        ("smooth", "at least 0, below 1", 0 <= s.smooth < 1),
    )
    curves = {run: read_metrics(Path(run)) for run in s.runs}
    for run, rows in curves.items():
        if not rows:
            raise ValueError(f"{run} has no metrics.jsonl with rows: is it the folder of a run?")
    if Path(s.out).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out={s.out!r} should end in .png, .svg or .pdf")
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from e
    matplotlib.use("agg")  # draws files, needs no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, rows) in enumerate(curves.items()):
        color = f"C{number}"
        training = [row for row in rows if "loss" in row and s.x in row]
        axes.plot(
            [row[s.x] for row in training],
            running_mean([row["loss"] for row in training], s.smooth),
            color=color,
            alpha=0.45,
            linewidth=1,
            label=f"{name}, training",
        )
        evaluated = [row for row in rows if row.get("val_loss") is not None and s.x in row]
        if evaluated:
            xs, ys = [row[s.x] for row in evaluated], [row["val_loss"] for row in evaluated]
            label = f"{name}, validation (best {min(ys):.3f})"
            axes.plot(xs, ys, color=color, marker="o", markersize=3.5, label=label)
    axes.set_xlabel(s.x)
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(s.title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(s.out, dpi=130)
    print(f"wrote {s.out}")


def running_mean(values: list[float], keep: float) -> list[float]:
    """Exponential mean, corrected for its start as in Adam (arXiv:1412.6980)."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


if __name__ == "__main__":
    settings.run(main)
