"""The picture at the top of README: what the first command's run learned, and what it wrote.

    python -m lessons.first_run out/small     of a run: its loss, gzip and xz of its text, samples
    python -m lessons.first_run               again, from the numbers and texts that the SVG keeps

A run of config/small.py is evaluated twice, after 1,500 steps and at its end (or, where fewer fit
into its minutes, once). Each of these checkpoints writes the first sample of seed 1, nothing is
chosen; and before the first step the weights are those of the seed, so all tokens are equally
likely. Bits per byte of single batches are an estimate, as in plot.py: their tokens are taken to
have as many bytes as those of the validation text.
"""

import math
import re
from pathlib import Path
from xml.sax.saxutils import escape

import evaluate
import plot
from dataset import Dataset
from engine import checkpoint, settings
from engine.files import atomic_file
from engine.metrics import read_metrics
from lessons import ROOT, pictures

PICTURE = ROOT / "docs" / "small.svg"
PROMPT, TOKENS, WIDTH, LINES = "def ", 110, 54, 5  # of a sample, and what of it has room
HOW = dict(temperature=0.7, top_p=0.95)


def measured(run: Path) -> dict:
    """What the picture shows of a run."""
    import torch

    from generate import generate

    torch.set_num_threads(1)
    rows = read_metrics(run)
    found = [row for row in rows if row.get("val_bpb")][-2:]
    if not found:
        raise ValueError(f"{run} has no row with bits per byte (val_bpb): there is nothing to draw")
    bits = found[-1]["val_bpb"] / found[-1]["val_loss"]  # bits a byte for each nat a token
    losses = [(row["step"], bits * row["loss"]) for row in rows if "loss" in row]
    steps, losses = zip(*losses, strict=True)
    texts = {}
    for row in found:
        path = checkpoint.find(str(run), str(row["step"]))
        model, tokenizer, state = checkpoint.load_weights(path)
        if not texts:
            first = type(model)(model.config)
            first.init_weights(seed=state["settings"]["seed"])
            texts["0"] = written(generate, first.eval(), tokenizer)
        texts[str(row["step"])] = written(generate, model, tokenizer)
    data = Dataset(state["settings"]["data"])
    packed = re.findall(r"(\w+ -\w+) ([\d.]+)", evaluate.compressors(data.split("val")))
    return dict(
        step=(0, *steps),
        bits=(bits * math.log(model.config.vocab_size), *losses),
        evaluated=[(row["step"], row["val_bpb"]) for row in found],
        packed={name: float(size) for name, size in packed},
        texts=texts,
    )


def written(generate, model, tokenizer) -> list[str]:
    """The first lines of what a model writes."""
    prompt = tokenizer.encode(PROMPT)
    tokens = [token for (token,) in generate(model, prompt, TOKENS, seed=1, **HOW)]
    text = re.sub(r"[^\n -~]", "�", PROMPT + tokenizer.decode(tokens))
    return [line[:WIDTH].rstrip() for line in text.split("\n") if line.strip()][:LINES]


def drawn(data: dict) -> str:
    """As SVG: the curve on the left; on the right, in the colours of their points, the samples."""
    from lessons.style import BLUE, FONTS, GREEN, GREY, INK, LOOK, ORANGE, mixed, plt, svg

    with plt.rc_context(LOOK):
        figure = plt.figure(figsize=(8.4, 3.25))
        axes = figure.add_axes((0.07, 0.135, 0.42, 0.84))
        steps, last = data["step"], data["step"][-1]
        points = [(0, data["bits"][0]), *data["evaluated"]]
        colors = (ORANGE, GREEN, BLUE) if len(points) == 3 else (ORANGE, BLUE)
        axes.plot(steps, data["bits"], color=mixed(BLUE, 0.3), lw=0.8)
        whole = slice(3, -3)  # where a mean has neighbours on both sides
        axes.plot(steps[whole], plot.smoothed(data["bits"], 0.75)[whole], color=mixed(BLUE, 0.75))
        for name, bits in data["packed"].items():
            axes.axhline(bits, color=GREY, lw=0.9, ls=(0, (4, 3)))
            axes.text(last, bits + 0.02, f"{name}  {bits:.3f}", ha="right")
        for (step, bits), color in zip(points, colors, strict=True):
            axes.plot([step], [bits], "o", ms=5, color=color, zorder=3)
            x, y = (step, bits + 0.08) if step else (0.09 * last, bits - 0.03)
            axes.text(x, y, f"{bits:.3f}", color=color, weight="bold", ha="center")
        axes.set(xlabel="step", ylabel="bits / byte", xlim=(-0.02 * last, 1.06 * last))
        axes.set(ylim=(1.1, 3.25), yticks=(1.5, 2, 2.5, 3))
        picture = svg(figure, data)
    lines = [f'<g font-family="Menlo, Consolas, DejaVu Sans Mono, monospace" fill="{INK}">']
    y = 14.0
    for (step, text), color in zip(data["texts"].items(), colors, strict=True):
        lines.append(f'<circle cx="318" cy="{y - 3:g}" r="3.5" fill="{color}"/>')
        name = f'font-family="{FONTS}" font-size="9" fill="{color}" font-weight="bold"'
        lines.append(f'<text x="326" y="{y:g}" {name}>step {step}</text>')
        for line in text:
            y += 11.6
            place = f'x="326" y="{y:g}" font-size="8.2" xml:space="preserve"'
            lines.append(f"<text {place}>{escape(line)}</text>")
        y += 20
    return picture.replace("</svg>", "\n".join([*lines, "</g>", "</svg>"]))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError("name one run, out/small, or none to draw again what the picture keeps")
    settings.require_package("matplotlib", True)
    data = pictures.rounded(measured(Path(argv[0]))) if argv else pictures.kept(PICTURE)
    with atomic_file(PICTURE) as partial:
        partial.write_text(drawn(data), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    settings.run(main)
