"""What does a trunk know that it was not taught? python evaluate.py out/masked --probe --data=ROWS

The weights are frozen. Of each prompt the mean of its hidden states is taken, (C) numbers, and a
logistic regression learns to tell the label from them: a linear probe (arXiv:1610.01644). What a
line can part was laid apart by the trunk. So one trunk can be compared with another, whatever they
have learned by; and beside it stand what needs no trunk: the most frequent label, and the same
regression on a bag of words; and a trunk of the same shape before it has learned anything.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch

import scores
from dataset import Dataset, layout
from engine.arithmetic import EVAL_TOKENS
from engine.settings import require_package
from exam import FLOOR_ROWS, by_length, rows_of
from grading import LABELS, Row, aligned
from model import GPT
from tokenizer import Tokenizer

SHOWN = 100  # characters of a text
NEIGHBOURS = 5
POINTS = 2000  # of a picture
NAMED = 150  # tokens of a picture that are written beside their points
WORDS = 20_000  # of the bag, the most frequent
ITERATIONS = 1000


def tell(s, run, here) -> None:
    """What `s` asks for (probe, nearest, map) of a model; `s` are the settings of evaluate.py."""
    data = Dataset(*run.folder(s))
    run.make_ready(s, here)
    see = Sight(run.model.eval(), run.tokenizer)
    if s.probe:
        probe(s, see, data)
    if s.nearest:
        nearest(s, see, data)
    if s.map:
        draw(s, see, data)


class Sight:
    """A frozen trunk: called with texts or rows, it gives the mean of their last hidden states."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def ids(self, what: str | Row) -> list[int]:
        """A prompt as the model reads it: with the markers of turns, if it knows them."""
        t = self.tokenizer
        if isinstance(what, str) or not t.markers:
            ids = t.encode_prompt(what if isinstance(what, str) else what.prompt)
        else:
            ids = t.encode_row(what.messages, what.task if what.task in t.tasks() else "", True)
        return ids[-self.model.config.block_size :]

    @torch.no_grad()
    def __call__(self, some: list) -> np.ndarray:
        """(N, C), float32."""
        prompts = [self.ids(what) for what in some]
        device, policy = self.model.wte.weight.device, self.model.config.mask
        found = np.zeros((len(prompts), self.model.config.n_embd), np.float32)
        for batch in by_length(prompts, lambda n: EVAL_TOKENS // n):
            T = len(prompts[batch[-1]])
            there = np.arange(T) < np.array([len(prompts[i]) for i in batch])[:, None]  # (B, T)
            tokens = np.full(there.shape, self.tokenizer.end_of_text)
            tokens[there] = np.concatenate([prompts[i] for i in batch])
            mask = None
            if policy == "full":
                mask = there[:, None, None] | np.eye(T, dtype=bool)
            elif policy == "prefix" and self.tokenizer.markers:
                mask = layout(tokens, self.tokenizer.markers, policy)[1]
            mask = None if mask is None else torch.from_numpy(mask).to(device)
            x = self.model.trunk(torch.from_numpy(tokens).to(device), mask).float()  # (B, T, C)
            counted = torch.from_numpy(there).to(device)[..., None]
            found[batch] = ((x * counted).sum(dim=1) / counted.sum(dim=1)).cpu().numpy()
        return found


# --- what a line can part


def probe(s, see: Sight, data: Dataset) -> None:
    """Prints, for each task with labels, how many of them each regression tells. Raises ValueError
    for data without any."""
    if data.kind != "rows":
        raise ValueError(
            f"--probe needs rows with labels, and {data.folder} holds text: --data=ROWS"
        )
    require_package("sklearn", True, "scikit-learn")
    learned = rows_of(data.split("train"), s.limit or FLOOR_ROWS, s.task)
    asked = rows_of(data.split(s.split), s.limit, s.task)
    labels = {task: len({row.reference for row in learned.get(task, [])}) for task in asked}
    few = [task for task in asked if 2 <= labels[task] <= LABELS]
    if not few:
        raise ValueError(f"no task of {data.folder} has 2 to {LABELS} different answers to tell")
    for task in few:
        rows = f"{len(asked[task]):,} rows of the {s.split} split"
        print(f"\n{task or 'rows'}: {rows}, regressions from {len(learned[task]):,} of train")
        lines = probed(s, see, learned[task], asked[task])
        print(*aligned([["", "accuracy", "95% interval"], *lines]), sep="\n")


def probed(s, see: Sight, learned: list[Row], asked: list[Row]) -> Iterator[list[str]]:
    """The lines of a table."""
    labels = [row.reference for row in learned]
    references = [row.reference for row in asked]
    both, n = learned + asked, len(learned)
    fresh = GPT(see.model.config)
    fresh.init_weights(s.seed)
    fresh = fresh.eval().to(see.model.wte.weight.device)
    features = {"this trunk": see(both), "bag of words": bag(both, n)}
    features["random weights"] = Sight(fresh, see.tokenizer)(both)
    said = {name: told(x[:n], labels, x[n:]) for name, x in features.items()}
    said["most frequent"] = [scores.most_frequent(labels)] * len(asked)
    for name, answers in said.items():
        score = scores.mean(scores.exact(answers, references))
        low, high = scores.interval(scores.resampled(score))
        yield [name, f"{score.value:.2f}", f"{low:.2f} to {high:.2f}"]


def told(known, labels: list[str], x) -> list[str]:
    """The labels of x, by a logistic regression on what is `known`. The numbers of a state are
    brought to one scale before; the words of a bag, each there or not, have one."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler() if isinstance(known, np.ndarray) else "passthrough"
    model = make_pipeline(scale, LogisticRegression(max_iter=ITERATIONS))
    return model.fit(known, labels).predict(x).tolist()


def bag(rows: list[Row], learned: int):
    """Which words stand in each prompt, of those of the first `learned`: (rows, words), sparse."""
    from sklearn.feature_extraction.text import CountVectorizer

    def words(text: str) -> list[str]:
        return scores.WORDS.findall(text.lower())

    texts = [row.prompt for row in rows]
    count = CountVectorizer(analyzer=words, binary=True, max_features=WORDS).fit(texts[:learned])
    return count.transform(texts)


# --- neighbours, and a map


def nearest(s, see: Sight, data: Dataset) -> None:
    """Prints the texts whose mean states point in the direction of that of `s.nearest`. What all
    have in common is taken away first: else all point alike."""
    some = texts_of(s, see, data)
    asked = s.nearest
    if data.kind == "rows":  # it stands between the same markers
        asked = some[0]._replace(messages=[dict(role="user", content=asked)])
    x = see([*some, asked])
    x = x - x[:-1].mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-9)
    cosines = x[:-1] @ x[-1]
    for i in np.argsort(-cosines)[:NEIGHBOURS]:
        text = some[i] if isinstance(some[i], str) else some[i].prompt
        label = "" if isinstance(some[i], str) else f"  {some[i].reference[:20]}"
        print(f"{cosines[i]:+.3f}{label}  {' '.join(text.split())[:SHOWN]}")


def texts_of(s, see: Sight, data: Dataset) -> list:
    """The rows of a split, or the beginnings of its documents."""
    split = data.split(s.split)
    if data.kind == "rows":
        return [row for rows in rows_of(split, s.limit, s.task).values() for row in rows]
    strip, end, most = split.strips[0], data.tokenizer.end_of_text, see.model.config.block_size
    places = strip.rows(end)[0].tolist()
    documents = (strip.read(begin, min(length, most)) for begin, length in places)
    return [data.tokenizer.decode(ids[ids != end].tolist()) for ids in documents if len(ids) > 1]


def draw(s, see: Sight, data: Dataset) -> None:
    """A picture: the two directions in which the rows of a split, or the most frequent tokens of a
    text, lie farthest apart (principal components)."""
    require_package("matplotlib", True)
    from matplotlib.figure import Figure  # without pyplot, which would ask for a screen

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    if data.kind == "rows":
        rows = texts_of(s, see, data)[:POINTS]
        if len(rows) < 3:
            raise ValueError(f"a map needs 3 rows or more, and there are {len(rows)}")
        at, share = components(see(rows))
        answers = np.array([row.reference for row in rows])
        for label in sorted({*answers.tolist()})[:LABELS]:
            axes.scatter(*at[answers == label].T, s=12, alpha=0.7, label=label[:20])
        axes.legend(frameon=False, fontsize=8)
        what = f"{len(rows):,} rows of the {s.split} split"
    else:
        data.require_tokenizer(see.tokenizer, s.out)
        ids = data.split(s.split).read(0, EVAL_TOKENS * 8)
        counts = np.bincount(ids)
        often = counts.argsort()[::-1][: min(POINTS, np.count_nonzero(counts))]
        at, share = components(see.model.wte.weight[often.copy()].detach().float().cpu().numpy())
        axes.scatter(*at.T, s=6, alpha=0.3)
        for i in range(min(NAMED, len(often))):
            text = see.tokenizer.decode([int(often[i])])
            axes.annotate(printable(text), at[i], fontsize=7, parse_math=False)
        what = f"the {len(often):,} most frequent tokens"
    across, up = f"{share[0]:.1%} of the variance", f"{share[1]:.1%}"
    axes.set(title=f"{s.out}: {what}", xlabel=across, ylabel=up)
    figure.savefig(s.map, dpi=130)
    print(f"wrote {s.map}")


def printable(text: str) -> str:
    """White space in signs, as in repr; what no font has is left out."""
    return re.sub(r"[^ -~\u00a1-\u024f]", "", repr(text)[1:-1])


def components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of x (N, C), (N, 2), and their shares of the variance."""
    x = x - x.mean(axis=0)
    _, sizes, directions = np.linalg.svd(x, full_matrices=False)
    return x @ directions[:2].T, (sizes**2 / (sizes**2).sum())[:2]
