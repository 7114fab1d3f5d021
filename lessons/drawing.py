"""How the pictures of docs/learn are drawn: one function a picture, from the numbers that its
namesake in pictures.py returns. What they have in common is in style.py."""

from matplotlib.patches import Circle, Polygon, Rectangle

from lessons.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LOOK,
    ORANGE,
    PALE,
    VIOLET,
    arrow,
    box,
    canvas,
    mixed,
    plots,
    plt,
    squares,
    svg,
)


def picture(name: str, data: dict) -> str:
    """As SVG."""
    with plt.rc_context(LOOK):
        return svg(globals()[name](**data), data)


# --- chapters 0 to 3


def surprise(tokens, nats, least):
    figure, axes = plots(1, 2.2)
    bar = tokens.index("|")
    colors = [BLUE if i < bar else ORANGE if i == bar else GREEN for i in range(len(nats))]
    axes.bar(range(len(nats)), nats, 0.7, color=colors)
    axes.axhline(least, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes.text(len(nats) - 0.5, least + 0.08, f"ln 26 = {least:.2f}", ha="right")
    for i, x in enumerate(nats):
        if i > bar:
            axes.text(i, 0.08, f"{x:.3f}", ha="center", fontsize=7, color=GREEN)
    axes.set_xticks(range(len(nats)), tokens)
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="−ln p", ylim=(0, 4), xlim=(-0.6, len(nats) - 0.4))
    return figure


def block(shapes, blocks, heads):
    figure, axes = canvas(28, 13.6, 3.4)
    told = {name: f"({', '.join(map(str, shape))})" for name, shape in shapes.items()}
    B, T, C = shapes["wte"]
    per_head = f"({B}, {heads}, {T}, {C // heads})"
    low = 2.0
    axes.add_patch(Rectangle((3.2, 1.0), 19.7, 12.1, fc="#f6f8fa", ec=GREY, lw=0.7, ls=(0, (4, 3))))
    axes.text(22.6, 12.4, f"× {blocks}", ha="right", va="center", fontsize=11)
    arrow(axes, (2.9, low), (25.0, low), BLUE, 2.4)
    box(axes, 0.3, low - 0.6, 2.6, 1.2, "wte", mixed(BLUE, 0.25))
    box(axes, 25.0, low - 0.6, 2.7, 1.2, "norm\nhead", mixed(BLUE, 0.25), size=7.5)
    axes.text(1.6, low - 1.2, told["wte"], ha="center", va="center", fontsize=7)
    axes.text(26.2, low - 1.2, told["head"], ha="center", va="center", fontsize=7)
    branches = (
        (4.0, 5.8, ORANGE, ("attn_norm", "wq wk wv", "softmax(q kᵀ / √D)"), ("· v", "wo")),
        (15.0, 3.4, GREEN, ("mlp_norm", "up", "relu²"), ("down",)),
    )
    keys = {"softmax(q kᵀ / √D)": "attn.drop", "relu²": "up"}
    told |= {"wq wk wv": f"3 × {per_head}", "· v": per_head}
    for x, wide, color, rising, falling in branches:
        y = low
        for name in rising:
            arrow(axes, (x + 0.6, y), (x + 0.6, y + 1.2), color)
            y += 1.2
            box(axes, x, y, wide, 1.3, name, mixed(color, 0.3), size=8)
            y += 1.3
            axes.text(x + 1.0, y + 0.5, told[keys.get(name, name)], va="center", fontsize=7)
        right = x + wide + 2.0
        axes.plot(
            [x + 0.6, x + 0.6, right, right], [y, y + 1.3, y + 1.3, y + 1.2], color=color, lw=1
        )
        y += 1.3
        for name in falling:
            above, y = y, 5.0 if name == falling[-1] else 7.9
            arrow(axes, (right, above), (right, y + 1.3), color)
            box(axes, right - 1.1, y, 2.2, 1.3, name, mixed(color, 0.3), size=8)
            axes.text(right + 0.3, y - 0.5, told[name], va="center", fontsize=7)
        arrow(axes, (right, 5.0), (right, low + 0.5), color)
        axes.plot([right], [low], "o", ms=11, mfc="white", mec=BLUE, mew=1.2)
        axes.text(right, low, "+", ha="center", va="center", fontsize=11, color=BLUE)
    return figure


def merges(words, states, new):
    figure, axes = canvas(28, 14.6, 3.65)
    colors = dict(zip(new, (ORANGE, BLUE, GREEN, VIOLET), strict=True))
    lefts = [4.6 + 5.9 * i for i in range(len(words))]
    for x, (word, count) in zip(lefts, words.items(), strict=True):
        label = word + (f" × {count}" if count > 1 else "")
        axes.text(x + 2.5, 13.5, label, ha="center", va="center", fontsize=12)
    for row, state in enumerate(states):
        y = 10.8 - 2.5 * row
        if row:
            token = new[row - 1]
            axes.text(0.3, y + 0.75, f"{255 + row}", va="center", fontsize=9, color=GREY)
            box(axes, 1.7, y + 0.2, 2.2, 1.1, readable(token), mixed(colors[token], 0.45), size=8)
        for x, word in zip(lefts, words, strict=True):
            for token in state[word]:
                size = len(token) // 2
                color = mixed(colors[token], 0.45) if token in colors else PALE
                box(axes, x, y, 0.86 * size - 0.06, 1.5, "", color)
                for i in range(size):
                    at = x + 0.86 * i + 0.4
                    axes.text(
                        at,
                        y + 0.75,
                        token[2 * i : 2 * i + 2],
                        ha="center",
                        va="center",
                        fontsize=7.5,
                    )
                x += 0.86 * size
    return figure


def readable(token: str) -> str:
    """A token given in hex, as text if it is text."""
    try:
        return bytes.fromhex(token).decode()
    except UnicodeDecodeError:
        return token


def windows(tokens, T, starts):
    figure, axes = canvas(28, 13.4, 3.35)
    unit, left = 1.22, 3.2
    for epoch, order in enumerate(starts):
        base = 6.6 * (1 - epoch) + 0.4
        color = (BLUE, ORANGE)[epoch]
        axes.text(0.4, base + 5.3, f"epoch {epoch}", va="center", fontsize=9)
        for i in range(tokens):
            box(axes, left + unit * i, base + 4.7, unit - 0.1, 1.2, str(i), PALE, size=7.5)
        for rank, start in enumerate(order):
            y = base + 3.4 - 1.05 * rank
            axes.text(1.6, y + 0.4, str(rank), ha="right", va="center", fontsize=8, color=GREY)
            for i in range(start, start + T + 1):
                x = left + unit * i
                if i < start + T:
                    axes.add_patch(Rectangle((x, y + 0.42), unit - 0.1, 0.4, fc=color, lw=0))
                if i > start:
                    axes.add_patch(Rectangle((x, y), unit - 0.1, 0.34, fc=mixed(color, 0.4), lw=0))
            axes.text(left + unit * start - 0.2, y + 0.62, "x", ha="right", va="center", fontsize=7)
            right = left + unit * (start + T + 1)
            axes.text(right + 0.1, y + 0.17, "y", va="center", fontsize=7)
    return figure


# --- chapters 4 to 6


def attention(tokens, percent, mask):
    layers, heads, T = len(percent), len(percent[0]), len(tokens)
    figure, axes = plt.subplots(layers, heads, figsize=(7, 3.9))
    figure.subplots_adjust(0.035, 0.01, 0.995, 0.93, 0.1, 0.2)
    first = [row.index(0) if 0 in row else T for row in mask]  # hidden from here on
    stairs = [(x, y) for i, x in enumerate(first) for y in (i, i + 1)]
    for layer in range(layers):
        for head in range(heads):
            ax, weights = axes[layer, head], percent[layer][head]
            ax.set(xlim=(0, T), ylim=(T, 0), aspect="equal")
            ax.add_patch(Polygon([(T, 0), *stairs, (T, T)], fc=PALE, lw=0))
            for step in range(1, 11):  # ten shades
                cells = [
                    (j, i)
                    for i in range(T)
                    for j in range(T)
                    if -(-weights[i][j] // 10) == step and weights[i][j] > 2
                ]
                squares(ax, cells, mixed(BLUE, 0.1 + 0.09 * step))
            ax.set_xticks([i + 0.5 for i in range(T)], tokens)
            ax.set_yticks([i + 0.5 for i in range(T)], tokens if head == 0 else [""] * T)
            ax.tick_params(length=0, labelsize=6.5, pad=1.5, top=True, labeltop=True)
            ax.tick_params(bottom=False, labelbottom=False)
            ax.spines[:].set_visible(False)
            ax.text(T - 0.4, 1.4, f"L{layer} H{head}", ha="right", va="center", fontsize=8)
    return figure


def rotary(turned, scores):
    figure = plt.figure(figsize=(7, 3.6))
    for pair, arrows in enumerate(turned):
        ax = figure.add_axes((0.01 + 0.247 * pair, 0.5, 0.235, 0.46))
        ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        ax.axis("off")
        ax.add_patch(Circle((0, 0), 1, fc="none", ec=PALE))
        for position, (a, b) in enumerate(arrows):
            shade = mixed(BLUE, 1 - 0.1 * position)
            arrow(ax, (0, 0), (a, b), shade, 1.0)
            if pair < 2 or position in (0, len(arrows) - 1):
                ax.text(1.17 * a, 1.17 * b, position, ha="center", va="center", fontsize=7)
        ax.text(-1.25, 1.12, f"i = {pair}", fontsize=8)
    ax = figure.add_axes((0.075, 0.115, 0.91, 0.34))
    for (base, values), color in zip(scores.items(), (BLUE, ORANGE), strict=True):
        ax.plot(values, color=color, marker="o", ms=2, lw=1)
        ax.text(63.6, values[-1], f"base {base}", color=color, va="center", fontsize=8)
    ax.axhline(0, color=PALE, lw=0.7, zorder=0)
    ax.set(xlim=(0, 72), xticks=range(0, 64, 10), xlabel="m − n", ylabel="R(m) q · R(n) k")
    return figure


def lens(tokens, said, p):
    figure, axes = canvas(28, 8.6, 2.15)
    unit, left = 1.95, 4.2
    for row in range(len(said)):
        y = 1.6 + 1.75 * row
        label = "embed_norm" if row == 0 else f"blocks.{row - 1}"
        axes.text(left - 0.4, y + 0.75, label, ha="right", va="center", fontsize=8)
        for i, sign in enumerate(said[row]):
            strong = p[row][i]
            ink = "white" if strong > 0.7 else INK
            box(axes, left + unit * i, y, unit - 0.12, 1.5, "", mixed(GREEN, 0.08 + 0.92 * strong))
            x = left + unit * i + unit / 2
            axes.text(x, y + 0.95, sign, ha="center", va="center", fontsize=9, color=ink)
            if sign.strip():
                axes.text(
                    x, y + 0.32, f"{strong:.2f}", ha="center", va="center", fontsize=6, color=ink
                )
    for i, token in enumerate(tokens):
        axes.text(
            left + unit * i + unit / 2, 0.9, token, ha="center", va="center", color=INK, fontsize=10
        )
    axes.text(left + unit * len(tokens) / 2, 7.7, "softmax(head(norm(x)))", ha="center", fontsize=9)
    return figure


# --- chapters 7 and 8


def rates(step, rate, loss):
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 3.4), sharex=True, layout="constrained", height_ratios=(1, 2)
    )
    above.plot(step, rate, color=ORANGE)
    above.set(ylabel="lr", ylim=(0, 0.022))
    below.plot(step, loss, color=BLUE, marker="o", ms=2.5)
    below.set(ylabel="loss", xlabel="step", xlim=(0, 1520), ylim=(1.6, 3.5))
    return figure


def muon(before, after):
    figure, axes = plots(1, 2.6)
    places = range(1, len(before) + 1)
    axes.semilogy(places, before, color=BLUE, marker="o", ms=3, lw=1)
    axes.semilogy(places, after, color=ORANGE, marker="o", ms=3, lw=1)
    axes.axhline(1, color=PALE, lw=0.8, zorder=0)
    axes.text(12, 0.021, "σᵢ(g) / ‖g‖", color=BLUE, ha="right")
    axes.text(12, 1.5, "σᵢ(orthogonalise(g))", color=ORANGE)
    axes.set(xlabel="i", ylim=(1e-4, 4), xlim=(0, len(before) + 1))
    return figure


def chances(logits, p):
    figure, axes = plots(4, 2.1, sharey=True)
    for ax, (name, shares) in zip(axes, p.items(), strict=True):
        cut = name.startswith("top_p")
        ax.bar(range(3), shares, 0.62, color=ORANGE if cut else BLUE)
        for i, x in enumerate(shares):
            ax.text(i, x + 0.025, f"{x:.3f}" if x else "0", ha="center", fontsize=8)
        if cut:  # from what
            ax.bar(range(3), p["temperature=1"], 0.62, fc="none", ec=GREY, ls=(0, (3, 2)), lw=0.8)
        ax.set_title(name, fontsize=9, pad=5)
        ax.set_xticks(range(3), [f"{x:g}" for x in logits])
        ax.set(ylim=(0, 1), xlabel="logit")
        ax.tick_params(axis="x", length=0)
    axes[0].set_ylabel("p")
    return figure


def cache(tokens, without, with_cache):
    figure, axes = canvas(28, 9.2, 2.3)
    unit = 1.06
    for left, sizes, color, name in (
        (0.5, without, ORANGE, "cache=None"),
        (14.3, with_cache, BLUE, "KVCache"),
    ):
        total = 0
        for row, size in enumerate(sizes):
            y, seen = 6.6 - 1.25 * row, without[row]
            total += size
            for i in range(seen):
                new = i >= seen - size
                fill = color if new else "white"
                edge = color if new else GREY
                x = left + unit * i
                axes.add_patch(Rectangle((x, y), unit - 0.14, 0.95, fc=fill, ec=edge, lw=0.7))
                ink = "white" if new else GREY
                axes.text(
                    x + unit / 2 - 0.07,
                    y + 0.46,
                    tokens[i],
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ink,
                )
            axes.text(left + unit * 11 + 0.2, y + 0.46, f"+{size}", va="center", fontsize=8)
        axes.text(left, 8.3, name, va="center", fontsize=9, color=color)
        axes.text(left + unit * 11 + 0.2, 0.8, f"= {total}", va="center", fontsize=9, color=color)
    return figure


# --- docs/scaling.md


def isoflop(budgets, runs, fitted, N, curves, every, least):
    figure, (left, right) = plots(2, 2.9, sharey=True)
    colors = (BLUE, ORANGE, GREEN, VIOLET, INK)
    for budget, (sizes, losses), curve, color in zip(budgets, runs, curves, colors, strict=True):
        known = budget <= fitted
        shown = [(n, y) for n, y in zip(N, curve, strict=True) if y < 7]
        left.semilogx(
            *zip(*shown, strict=True), color=color, lw=1, ls="-" if known else (0, (3, 2))
        )
        dot = dict(marker="o", ms=4, ls="", color=color, mfc=color if known else "white")
        left.semilogx(sizes, losses, label=f"{budget:.0e}".replace("+", ""), **dot)
        right.semilogx([budget] * len(losses), losses, **dot)
    right.semilogx(every, least, color=GREY, lw=1, ls=(0, (3, 2)))
    left.set(xlabel="N", ylabel="loss")
    left.legend(fontsize=7)
    right.set(xlabel="operations")
    return figure
