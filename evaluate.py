"""How good is a model? python evaluate.py out/small --split=test

A model gives each next token a probability p, and its surprise is -ln p: 0 where it was certain and
right, ln 2 = 0.69 where it wavered between two, ln V where it knew nothing of V tokens. The mean is
the loss, in **nats** a token; divided by ln 2 = 0.693 it is in **bits**, answers to yes-or-no
questions. **Perplexity** is exp(loss): a loss of 3 is as unsure as a fair choice of exp(3) = 20.

Per token, two vocabularies cannot be compared: longer tokens are fewer, and each is harder. The
text has the same bytes in any of them, so **bits per byte** can: nats of all tokens / ln 2 / bytes.
To predict is to compress: an arithmetic coder stores the text in just so many bits (Shannon 1948).
Hence gzip and xz, which know nothing of language, stand beside the model as the mark to beat:
fewer bits are better. (The model's own size is not counted.)

Of rows (conversations, questions with their answers) the model is asked all: exam.py lets it
answer, grading.py says what the answers are worth, and answers.jsonl has them, to be read.
"""

import gzip
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

import scores
from dataset import IGNORE, Dataset, Split
from engine import settings
from engine.settings import Count, NotNegative, Positive

if TYPE_CHECKING:  # torch is imported where it is used, since mistakes are told before that
    from engine.machine import Machine
    from model import GPT
    from tokenizer import Tokenizer

EVAL_TOKENS = 16384  # in one forward pass
COMPARABLE_BYTES = 20_000_000  # xz takes too long for a larger text
LOGITS = 1 << 26  # numbers of them at once, where each token's loss is wanted
WINDOW_TOKENS = 1 << 18  # enough for a mean by position, and for an interval
SAMPLE_TOKENS = 200  # of a text that is drawn, if max_tokens does not tell


@dataclass
class Settings:
    out: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    data: str = ""  # folder that prepare.py has written; by default that of the run
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    baseline: str = ""  # another run: is it better or worse, or is no difference shown?

    # of text
    eval_tokens: Count = 0  # tokens of it to evaluate on, evenly spread; 0 is all
    generate: Count = 0  # texts to draw: is their variety that of human ones?

    # of rows
    task: str = ""  # only the rows of this task
    limit: Count = 0  # rows of each task, evenly spread; 0 is all
    marker: str = ""  # ask under the marker of this task instead of the row's own; none is without
    choices: str = ""  # labels to choose from, as in yes,no; auto takes those of the training split
    normalise: bool = False  # choose by the mean of a label's tokens, which helps the longer ones
    exchange: bool = False  # also the perplexity of answers behind the prompt of another row
    max_tokens: Count = 0  # of an answer; 0 is a few more than the longest reference
    temperature: NotNegative = 0.0  # 0 takes the likeliest token; texts to compare are drawn at 1
    beam: Positive = 1  # likeliest beginnings that beam search follows; 1 is off
    length_penalty: NotNegative = 0.6  # of beam search: the higher, the longer
    slots: Positive = 32  # answers that are written side by side
    seed: int = 1  # of answers that are drawn
    answers: str = ""  # file to write them to; by default answers.jsonl in the folder of the run
    label: str = ""  # jsonl of rows without answers: writes them with the model's, for prepare.py

    # machine
    device_batch: Count = 0  # most rows in one forward pass, which bounds memory; 0 is no bound
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the work
    fast: bool = True  # parts that compute the same as model.py sooner; false runs model.py itself
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly


def main(argv: list[str]) -> int:
    s = settings.load(Settings, argv, "Evaluate a model.", "out")
    labels = s.choices.split(",") if s.choices else ["auto"]
    sound = all(labels) and len({*labels}) == len(labels)
    settings.require(sound, s, "choices", "labels joined by commas, each once")
    settings.require(s.beam == 1 or not s.temperature, s, "beam", "1 with a temperature above 0")
    settings.require(not s.label or Path(s.label).is_file(), s, "label", "a file of rows")
    here = start(s)
    run = Opened(s.out, s.checkpoint)
    if s.label or run.data(s).kind == "rows":
        return evaluate_rows(s, run, here)
    of_rows = ("task", "limit", "marker", "choices", "exchange")
    given = [name for name in of_rows if getattr(s, name) != getattr(Settings, name)]
    if given:
        raise ValueError(f"--{given[0]} is for rows, and the data holds running text")
    return evaluate_text(s, run, here)


def evaluate_run(s) -> int:
    """Prints the loss of the best checkpoint of the run `s.out`, and changes nothing."""
    here = start(s)
    run = Opened(s.out)
    tell_loss(s, run, run.data(s), here)
    return 0


def start(s) -> "Machine":
    from engine import machine

    here = machine.pick(s.device, s.dtype, "false")
    machine.start(here, s.deterministic)
    return here


class Opened:
    """A model to be evaluated, with its tokenizer."""

    def __init__(self, out: str, checkpoint: str = "best"):
        from engine.checkpoint import find, load_weights

        self.name, self.path = out, find(out, checkpoint)
        self.model, self.tokenizer, state = load_weights(self.path)
        self.trained_with = state["settings"]

    def data(self, s) -> Dataset:
        """The data of `s`, or of the run. Raises ValueError if the model reads other tokens."""
        folder = s.data or self.trained_with.get("data")
        if not folder:
            raise ValueError(f"{self.path} was not trained here: name the data, --data=data/NAME")
        named = s.tokenizer if s.data else s.tokenizer or self.trained_with.get("tokenizer", "")
        data = Dataset(folder, named, self.model.config.mask)
        if data.kind == "rows":
            self.require_markers()
        data.require_tokenizer(self.tokenizer, self.name)
        return data

    def require_markers(self) -> None:
        if not self.tokenizer.markers:
            raise ValueError(
                f"{self.name} has learned from running text alone and knows no turns: let it learn"
                " from rows first, as in `python train.py --init_from=RUN --data=ROWS`"
            )


# --- text


def evaluate(
    model: "GPT",
    split: Split,
    here: "Machine",
    stop=None,
    device_batch: int = 0,
    eval_tokens: int = 0,
) -> tuple | None:
    """The loss: nats a token, and bits a byte of text where its size is known.

    Every token but the first is predicted once, in consecutive windows of the model's block_size,
    or in about `eval_tokens` / block_size of them, evenly spread. Each process takes its share, at
    most `device_batch` rows at a time. None if meanwhile a `stop` was asked of any process.
    """
    import torch

    rows = max(1, EVAL_TOKENS // model.config.block_size)
    rows = min(rows, device_batch or rows)
    nats, targets, size, asked = 0.0, 0, 0, False
    part_of_it = 0 < eval_tokens < split.tokens - 1
    was_training = model.training
    model.eval()  # no dropout
    with torch.no_grad(), here.autocast():
        for batch in split.in_order(
            rows, model.config.block_size, here.rank, here.world, eval_tokens
        ):
            tokens, targets_here, positions, mask = map(here.put, batch)
            loss = model(tokens, targets_here, "sum", mask, positions).item()
            found = batch.targets[batch.targets != IGNORE]
            mine = split.bytes_of(found) if part_of_it and split.text_bytes else 0
            part = here.sum([loss, len(found), mine, bool(stop and stop.asked)])
            nats, targets, size = nats + part[0], targets + part[1], size + part[2]
            asked = part[3] > 0
            if asked:
                break
    model.train(was_training)
    if asked:
        return None
    size = size if part_of_it else split.text_bytes
    return nats / targets, nats / math.log(2) / size if size else None


def compressors(split: Split, tokenizer: "Tokenizer") -> str:
    """Bits per byte that gzip and xz need for the text of a split; empty if it is very large."""
    if (split.text_bytes or math.inf) > COMPARABLE_BYTES:
        return ""
    tokens = split.read(0, split.tokens)
    text = tokenizer.decode_bytes(tokens[tokens != tokenizer.end_of_text].tolist())
    if not text:
        return ""
    gz = len(gzip.compress(text, 9)) * 8 / len(text)
    xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(text)
    return f"gzip -9 {gz:.3f}, xz -9e {xz:.3f}"


def tell_loss(s, run: Opened, data: Dataset, here: "Machine") -> None:
    from engine import fast, machine

    run.model.to(here.device)
    machine.use_threads(s.threads, here, run.model, EVAL_TOKENS)
    fast.use(run.model, here, s.fast)
    split = data.split(s.split)
    loss, bpb = evaluate(run.model, split, here, None, s.device_batch, s.eval_tokens)
    bits = f", {bpb:.4f} bits per byte" if bpb else ""
    where = f"{run.path} on the {s.split} split of {data.folder}"
    here.say(f"{where}: {loss:.4f} nats a token{bits}")


def evaluate_text(s: Settings, run: Opened, here: "Machine") -> int:
    """Prints what a model makes of running text, beside compressors, another run, and people."""
    data = run.data(s)
    tell_loss(s, run, data, here)
    if here.rank:
        return 0
    split = data.split(s.split)
    if others := compressors(split, run.tokenizer):
        print(f"bits per byte of compressors: {others}")
    nats = window_nats(run.model, split, here)
    score = perplexity_of(nats)
    low, high = scores.interval(scores.resampled(score))
    print(f"perplexity {score.value:.3f} ({low:.3f} to {high:.3f} by {len(nats):,} windows)")
    print("loss by position in the window:", ", ".join(by_position(nats)))
    if s.baseline:
        other = Opened(s.baseline)
        data.require_tokenizer(other.tokenizer, s.baseline)
        contexts = [opened.model.config.block_size for opened in (run, other)]
        if contexts[0] != contexts[1]:
            raise ValueError(
                f"{s.out} and {s.baseline} have contexts of {contexts[0]} and {contexts[1]} tokens:"
                " they cannot be compared window by window"
            )
        theirs = perplexity_of(window_nats(other.model.to(here.device), split, here))
        gap, low, high, verdict = scores.compared(score, theirs)
        print(
            f"{s.baseline}: {theirs.value:.3f}, {gap:+.3f} ({low:+.3f} to {high:+.3f}): {verdict}"
        )
    if s.generate:
        variety(s, run, split, here)
    return 0


def window_nats(model: "GPT", split: Split, here: "Machine") -> np.ndarray:
    """The loss of each token (windows, T), nan where there is none, of windows evenly spread."""
    import torch
    import torch.nn.functional as F

    T, found = model.config.block_size, []
    rows = max(1, LOGITS // (T * model.config.vocab_size))
    model.eval()
    with torch.no_grad(), here.autocast():
        for batch in split.in_order(rows, T, most=WINDOW_TOKENS):
            tokens, targets, positions, mask = map(here.put, batch)
            logits = model(tokens, mask=mask, positions=positions).float()
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            found.append(nats.view_as(targets).masked_fill(targets == IGNORE, math.nan).cpu())
    return torch.cat(found).numpy()


def perplexity_of(nats: np.ndarray) -> scores.Score:
    return scores.perplexity(np.nansum(nats, axis=1), np.isfinite(nats).sum(axis=1))


def by_position(nats: np.ndarray) -> Iterator[str]:
    """Means over ranges of positions: the more it has read, the better a model should guess."""
    start, end = 0, 1
    while start < nats.shape[1]:
        yield f"{start} {np.nanmean(nats[:, start:end]):.2f}"
        start, end = end, end * 4


def variety(s: Settings, run: Opened, split: Split, here: "Machine") -> None:
    """Draws texts, and prints how varied they are beside as many human ones of the same lengths.

    Whoever lowers the temperature gets likelier texts and duller ones, so both have to be looked at
    (arXiv:1811.02549).
    """
    import exam
    from grading import aligned

    tokenizer, prompts = run.tokenizer, [run.tokenizer.encode_prompt("")] * s.generate
    model = exam.ready(run.model, here, s)
    most = min(s.max_tokens or SAMPLE_TOKENS, model.config.block_size)
    drawn = exam.written(model, tokenizer, prompts, most, s, s.temperature or 1.0)
    starts = np.linspace(0, max(0, split.tokens - most), len(drawn)).astype(int)
    human = [split.read(int(i), len(ids)) for i, ids in zip(starts, drawn, strict=True)]
    human = [ids[ids != tokenizer.end_of_text].tolist() for ids in human]
    texts = [[tokenizer.decode(ids) for ids in some] for some in (drawn, human)]
    lines = [["", "drawn", "human"]]
    for name, figure in scores.VARIETY.items():
        lines.append([name, *(f"{figure(some):.1f}" for some in texts)])
    print("", *aligned(lines), sep="\n")
    exam.write_lines(answers_file(s, run), [dict(text=text) for text in texts[0]])


# --- rows


def evaluate_rows(s: Settings, run: Opened, here: "Machine") -> int:
    import exam

    run.require_markers()
    other = Opened(s.baseline) if s.baseline else None
    if other:
        other.require_markers()
        other = (exam.ready(other.model, here, s), other.tokenizer)
    data = None if s.label else run.data(s)
    model = exam.ready(run.model, here, s)
    if here.rank == 0 and s.label:
        exam.label(s, model, run.tokenizer, answers_file(s, run))
    elif here.rank == 0:
        exam.examine(s, model, run.tokenizer, data, answers_file(s, run), other)
    return 0


def answers_file(s: Settings, run: Opened) -> Path:
    return Path(s.answers) if s.answers else run.path.parent / "answers.jsonl"


if __name__ == "__main__":
    settings.run(main)
