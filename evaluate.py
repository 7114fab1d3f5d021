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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

import objectives
import scores
from dataset import IGNORE, Dataset, Split
from engine import locked, settings
from engine.arithmetic import EVAL_TOKENS, LOGITS
from engine.settings import BelowOne, Count, NotNegative, Positive

if TYPE_CHECKING:  # torch is imported where it is used, since mistakes are told before that
    from engine.learner import Learner, Opened
    from engine.machine import Machine
    from model import GPT

COMPARABLE_BYTES = 20_000_000  # xz takes too long for a larger text
WINDOW_TOKENS = 1 << 18  # enough for a mean by position, and for an interval


@dataclass
class Settings:
    out: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    data: str = ""  # folders that prepare.py has written, as in a,b; by default those of the run
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    passphrase_file: str = ""  # opens locked weights, in memory alone: a file with the passphrase
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    baseline: str = ""  # another run: is it better or worse, or is no difference shown?

    # of text
    eval_tokens: Count = 0  # tokens of it to evaluate on, evenly spread; 0 is all
    device_batch: Count = 0  # most rows in one forward pass, which bounds memory; 0 is no bound
    generate: Count = 0  # texts to draw, 2 or more: is their variety that of human ones?

    # of rows
    task: str = ""  # only the rows of this task
    limit: Count = 0  # rows of each task, evenly spread; 0 is all
    marker: str = ""  # ask under the marker of this task instead of the row's own; none is without
    noise: BelowOne = 0.0  # this share of the letters of prompts is mistyped, before they are asked
    choices: str = ""  # labels to choose from, as in yes,no; auto takes those of the training split
    normalise: bool = False  # choose by the mean of a label's tokens, which helps the longer ones
    exchange: bool = False  # also the perplexity of answers behind the prompt of another row
    max_tokens: Count = 0  # of an answer; 0 is a few more than the longest reference
    temperature: NotNegative = 0.0  # 0 takes the likeliest token; texts to compare are drawn at 1
    vote: Count = 0  # answers drawn to each row, of which the one most like the others is given
    beam: Positive = 1  # likeliest beginnings that beam search follows; 1 is off
    length_penalty: NotNegative = 0.6  # of beam search: the higher, the longer
    slots: Positive = 32  # answers that are written side by side
    seed: int = 1  # of answers that are drawn
    answers: str = ""  # file to write them to; by default one in the folder of the run
    pairs: str = ""  # jsonl to write: of each wrong answer the better one and it, for preference
    label: str = ""  # jsonl of rows without answers: writes them with the model's, for prepare.py

    # of hidden states, whatever the objective was: see probe.py
    probe: bool = False  # can a line part the labels of rows, in the states of this trunk?
    nearest: str = ""  # a text: which of the split is nearest to it?
    map: settings.Picture = ""  # picture to write of the rows, or of the embeddings of tokens

    # of what should not have been learned: see canaries.py
    canaries: bool = False  # how much of the text, and which planted secrets, are known by heart?

    # machine
    quantize: settings.Quantize = ""  # int8: what do eight bits cost? of `out`, not of a baseline
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the work
    fast: bool = True  # parts that compute the same as model.py, faster; false runs model.py itself
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly


def main(argv: list[str]) -> int:
    s = settings.load(Settings, argv, "Evaluate a model.", "out")
    labels = s.choices.split(",") if s.choices else ["auto"]
    sound = all(labels) and len({*labels}) == len(labels)
    settings.require(sound, s, "choices", "labels joined by commas, each once")
    drawn = s.temperature or s.generate or s.vote
    least = "1 with a temperature above 0, texts to generate, or a vote"
    settings.require(s.beam == 1 or not drawn, s, "beam", least)
    several = "at least 2, to be compared with each other"
    settings.require(s.generate != 1, s, "generate", several)
    settings.require(s.vote != 1, s, "vote", several)
    unequal = "above 0 with --vote: else all answers to a row are equal"
    settings.require(not s.vote or s.temperature, s, "temperature", unequal)
    settings.require(not s.label or Path(s.label).is_file(), s, "label", "a file of rows")
    if s.pairs:
        refuse(s, ("marker", "noise"), "changes what is asked, and --pairs writes what was asked")
    if s.vote:
        refuse(s, ("choices",), "takes the likeliest label, and has no use with --vote")
    if s.label:
        of_references = ("limit", "task", "baseline", "exchange", "pairs", "vote")
        refuse(s, of_references, "has no use with --label")
    locked.use(s.passphrase_file, *map(Path, filter(None, (s.out, s.baseline))))
    from engine.learner import opened_here

    run, here = opened_here(s, s.checkpoint)
    looks = s.probe or s.nearest or s.map
    if s.label or (s.canaries and not looks):
        objectives.require_writer(run.state, s.out)
    if looks or s.canaries:
        import canaries
        import probe

        refuse(s, ("quantize",), "is for losses and answers")
        if here.rank == 0:
            (probe if looks else canaries).tell(s, run, replace(here, world=1))
        return 0
    data = None if s.label else run.data(s)
    of_rows = ("task", "limit", "marker", "noise", "choices", "normalise", "exchange", "pairs")
    of_rows += ("vote",)
    if data and not objectives.find(run.objective).Objective.generates:
        of_writers = ("baseline", "generate", "quantize", *of_rows)
        refuse(s, of_writers, f"is for what writes, unlike objective={run.objective}")
        tell_loss(s, run, data, here)
        return 0
    if s.label or data.kind == "rows":
        of_text = ("eval_tokens", "device_batch", "generate")
        refuse(s, of_text, f"is for running text, and {s.label or data.folder} holds rows")
        return evaluate_rows(s, run, data, here)
    held = "running text" if data.kind == "text" else data.kind
    refuse(s, of_rows, f"is for rows, and {data.folder} holds {held}")
    return evaluate_text(s, run, data, here)


def refuse(s: Settings, names: tuple[str, ...], why: str) -> None:
    """Raises ValueError for the first of these settings that is given: better than to ignore it."""
    for name in names:
        if getattr(s, name) != getattr(Settings, name):
            raise ValueError(f"--{name} {why}: leave it out")


def evaluate_run(s) -> int:
    """Prints the loss of the best checkpoint of the run `s.out`, and changes nothing."""
    from engine.learner import opened_here

    run, here = opened_here(s)
    tell_loss(s, run, run.data(s), here)
    return 0


# --- text


def evaluate(
    learner: "Learner",
    split: Split,
    here: "Machine",
    stop=None,
    device_batch: int = 0,
    eval_tokens: int = 0,
) -> dict | None:
    """`val_loss`, that of the learner's objective; `val_bpb`, bits a byte of text if it can be told
    in them; and val_<term> for each further term of the objective.

    Of text every token but the first is predicted once, in consecutive windows of the model's
    block_size, or in about `eval_tokens` / block_size of them, evenly spread. Each process takes
    its share, at most `device_batch` rows at a time. None if meanwhile a `stop` was asked of any
    process.
    """
    import torch

    from engine.learner import keyed

    objective, block_size = learner.objective, learner.gpt.config.block_size
    rows = max(1, EVAL_TOKENS // block_size)
    rows = min(rows, device_batch or rows)
    n, end_of_text = len(objective.terms), split.tokenizer.end_of_text
    found, size, asked = [0.0] * 2 * n, 0, False  # of each term its sum, then of how many things
    part_of_it = 0 < eval_tokens < split.tokens - 1
    was_training = learner.training
    learner.eval()  # no dropout
    with torch.no_grad(), here.autocast():
        for batch in split.in_order(rows, block_size, here.rank, here.world, eval_tokens):
            inputs, counts = objective.prepare(keyed(batch, end_of_text), learner)
            sums = learner.sums(*map(here.put, inputs))
            text = batch.targets[batch.targets != IGNORE]
            mine = split.bytes_of(text) if part_of_it and split.text_bytes else 0
            part = here.sum([*sums, *counts, mine, bool(stop and stop.asked)])
            found = [a + b for a, b in zip(found, part[:-2], strict=True)]
            size, asked = size + part[-2], part[-1] > 0
            if asked:
                break
    learner.train(was_training)
    if asked:
        return None
    size = size if part_of_it else split.text_bytes
    bits = found[0] / math.log(2) / size if size and objective.bits else None
    means = [a / b if b else math.nan for a, b in zip(found[:n], found[n:], strict=True)]
    named = dict(val_loss=objective.total(means, [1] * n), val_bpb=bits)
    terms = zip(objective.terms, means, strict=True)
    return named | {f"val_{name}": mean for name, mean in terms if name != "loss"}


def compressors(split: Split) -> str:
    """Bits per byte that gzip and xz need for the text of a split; empty if it is very large."""
    if (split.text_bytes or math.inf) > COMPARABLE_BYTES:
        return ""
    tokens = split.read(0, split.tokens)
    text = split.tokenizer.decode_bytes(tokens[tokens != split.tokenizer.end_of_text].tolist())
    if not text:
        return ""
    gz = len(gzip.compress(text, 9)) * 8 / len(text)
    # a dictionary larger than the text finds no more in it, and costs 600 MB of memory
    best = dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME)
    best["dict_size"] = min(max(4096, len(text)), 64 << 20)  # the least there is, that of -9
    xz = len(lzma.compress(text, filters=[best])) * 8 / len(text)
    return f"gzip -9 {gz:.3f}, xz -9e {xz:.3f}"


def tell_loss(s, run: "Opened", data: Dataset, here: "Machine") -> None:
    from engine.learner import told

    learner = run.learner()
    objectives.Base.require(learner.objective, data)  # not its own, which may import what is named
    run.make_ready(s, here, getattr(s, "quantize", ""))  # train.py's settings have none
    learner.to(here.device)
    split = data.split(s.split)
    found = evaluate(learner, split, here, None, s.device_batch, s.eval_tokens)
    found = told(found, learner.objective.unit)
    here.say(f"{run.path} on the {s.split} split of {data.folder}: {found}")


def evaluate_text(s: Settings, run: "Opened", data: Dataset, here: "Machine") -> int:
    """Prints what a model makes of running text, beside compressors, another run, and people."""
    bits = objectives.find(run.objective).Objective.bits
    if not bits:
        of_text = f"is for a loss of text, unlike objective={run.objective}"
        refuse(s, ("baseline", "generate"), of_text)
    tell_loss(s, run, data, here)
    if here.rank or not bits:
        return 0
    split = data.split(s.split)
    if others := compressors(split):
        print(f"bits per byte of compressors: {others}")
    nats = window_nats(run.model, split, here)
    score = perplexity_of(nats)
    low, high = scores.interval(scores.resampled(score))
    print(f"perplexity {score.value:.3f} ({low:.3f} to {high:.3f} by {len(nats):,} windows)")
    print("loss by position in the window:", ", ".join(by_position(nats)))
    if s.baseline:
        from engine.learner import Opened

        other = Opened(s.baseline)
        objectives.require_writer(other.state, s.baseline)
        data.require_tokenizer(other.tokenizer, s.baseline)
        if other.model.config.block_size != run.model.config.block_size:
            raise ValueError(
                f"{s.baseline} has a context of {other.model.config.block_size} tokens, and {s.out}"
                f" one of {run.model.config.block_size}: their windows are not the same"
            )
        other.make_ready(s, replace(here, world=1))  # the other processes are done
        theirs = perplexity_of(window_nats(other.model, split, here))
        gap, low, high, verdict = scores.compared(score, theirs)
        print(f"{s.baseline} has {theirs.value:.3f}, which makes {gap:+.3f}", end="")
        print(f" ({low:+.3f} to {high:+.3f}): {verdict}")
    if s.generate:
        import exam

        model = run.model if s.quantize else exam.ready(run.model, here, s)
        file = exam.answers_file(s.answers, run.path, "drawn.jsonl")
        exam.variety(s, model, run.tokenizer, split, file)
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
            tokens, targets, positions, mask = map(here.put, batch[:4])
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


# --- rows


def evaluate_rows(s: Settings, run: "Opened", data: Dataset | None, here: "Machine") -> int:
    """Asks rows, of the data or of the file `s.label`: the first process does."""
    import exam
    from engine.learner import Opened

    runs = [run, Opened(s.baseline)] if s.baseline else [run]
    for opened in runs:
        objectives.require_writer(opened.state, opened.name)
        opened.require_markers()
    if here.rank:
        return 0
    models = []
    for opened in runs:
        quantize = s.quantize if opened is run else ""  # the baseline as it is
        models.append((exam.ready(opened.model, here, s, quantize), opened.tokenizer))
    if s.label:
        exam.label(s, *models[0], exam.answers_file(s.answers, run.path, "labelled.jsonl"))
    else:
        exam.examine(s, models, data, exam.answers_file(s.answers, run.path, "answers.jsonl"))
    return 0


if __name__ == "__main__":
    settings.run(main)
