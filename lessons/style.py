"""What the pictures of docs/learn have in common: palette, fonts, parts, and how they become SVG.

One palette, thin lines, a white ground (GitHub's pages may be dark), 700 pixels wide. Text stays
text: the reader's browser has fonts for 天, and this machine need not. Equal numbers give equal
bytes, wherever matplotlib and its fonts are the same.
"""

import io
import json
import re
import warnings
from xml.sax.saxutils import escape

import matplotlib

matplotlib.use("agg")  # draws files, needs no screen
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path

INK, GREY, PALE = "#24292f", "#8c959f", "#e4e8ec"
BLUE, ORANGE, GREEN, VIOLET = "#2f6fb0", "#d9822b", "#4a9a6f", "#8a6bb8"
FONTS = "DejaVu Sans, Verdana, sans-serif"
LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nutshell",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.4,
    "patch.linewidth": 0.7,
    "legend.frameon": False,
}


def svg(figure, data: dict) -> str:
    """A figure as SVG, with the numbers that it was drawn from inside."""
    file = io.StringIO()
    for artist in figure.findobj():
        artist.set_clip_on(False)  # nothing reaches beyond, and each clip would be named
    with matplotlib.rc_context(LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has it
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    numbers = escape(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    _, _, drawing = file.getvalue().partition("</metadata>")
    size = "{:g} {:g}".format(*72 * figure.get_size_inches())
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head += f' viewBox="0 0 {size}" width="{72 * figure.get_figwidth():g}pt" font-family="{FONTS}">'
    return f"{head}\n<metadata>{numbers}</metadata>\n{slim(drawing)}"


def slim(drawing: str) -> str:
    """Without what says nothing; coordinates to a hundredth of a point. A third of the bytes."""
    names = r' id="(?:text|patch|axes|figure|line2d|[xy]tick|matplotlib\.axis)_\d+"'
    for waste in (names, r' transform="rotate\(-0 [^"]*"', r" font-family: [^;\"]*;?"):
        drawing = re.sub(waste, "", drawing)
    drawing = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", hundredth, tag[0]), drawing)
    drawing = re.sub(r"\s*\n\s*(?=[LzMCQ\"])", "", drawing)  # inside a path
    drawing = re.sub(r"([LMCQ]) ", r"\1", drawing)
    return re.sub(r"\n +", "\n", drawing.lstrip())


def hundredth(number: re.Match) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


# --- parts


def canvas(width: float, height: float, inches: float):
    """Empty axes in which a unit is as wide as high, 7 inches for `width` of them."""
    figure = plt.figure(figsize=(7, inches))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def plots(columns: int, inches: float, **how):
    figure, axes = plt.subplots(1, columns, figsize=(7, inches), layout="constrained", **how)
    figure.get_layout_engine().set(h_pad=0.08)
    return figure, axes


def box(axes, x, y, width, height, text="", color=PALE, ink=INK, size=9.0):
    """A rectangle from its lower left corner, with a text in it."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec="white"
    )
    axes.add_patch(shape)
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=size
    )


def arrow(axes, start, end, color=INK, width=1.0):
    how = dict(arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, lw=width, color=color)
    axes.add_patch(FancyArrowPatch(start, end, **how))


def mixed(color: str, share: float) -> str:
    """`color` on white: at 1 the colour, at 0 white."""
    rgb = matplotlib.colors.to_rgb(color)
    return matplotlib.colors.to_hex([1 - share * (1 - c) for c in rgb])


def squares(axes, cells, color):
    """Unit squares at (column, row) as one path: small where a picture has hundreds."""
    around = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
    path = [Path([(x + a, y + b) for a, b in around], closed=True) for x, y in cells]
    if path:
        axes.add_patch(PathPatch(Path.make_compound_path(*path), fc=color, lw=0))
