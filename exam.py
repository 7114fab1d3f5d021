"""An exam on rows: a model answers the prompts of a split. grading.py says what that is worth.

    rows ── prompts ──▶ answers ── references ──▶ figures, their intervals, and floors beside them

An answer is what the model writes behind `<|assistant|>`; or, with choices, the label that it finds
likeliest there. It is also asked how likely it finds the reference, and its own answer.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import grading
import tasks
from dataset import Dataset, Split
from engine import inference, machine, tables
from engine.arithmetic import EVAL_TOKENS, LOGITS
from engine.checkpoint import checkpoints
from engine.files import write_durably
from engine.machine import Machine
from engine.packing import Rows, fit
from engine.pipeline import Progress
from generate import answers, beam, prefill
from grading import Exam, Result, Row
from model import GPT
from robust import mistyped_prompt
from tokenizer import Tokenizer

FLOOR_ROWS = 20_000  # of each task, from which floors learn
SAMPLE_TOKENS = 200  # of a text that is drawn, if max_tokens does not tell
LONGER = 8  # tokens by which an answer may exceed the longest reference


def examine(s, models: list[tuple[GPT, Tokenizer]], data: Dataset, file: Path) -> None:
    """Asks the rows of a split, writes the answers to `file`, prints what they are worth.

    `s` are the settings of evaluate.py. A second of the `models` is what the first is compared
    with. Raises ValueError.
    """
    rows = rows_of(data.split(s.split), s.limit, s.task)
    learned = rows_of(data.split("train"), FLOOR_ROWS)
    made = {str(source): folder.made for folder in data.folders for source in folder.made["source"]}
    exams = []
    for task, some in rows.items():
        known, choices = learned.get(task, []), choices_of(s)
        own = [made[name] for name in made if task == name or task.startswith(f"{name}_")]
        groups = tasks.groups(task, s.split, own[0]) if own else {}
        exams.append(Exam(some, known, choices, bool(own), groups))
    if s.choices == "auto" and not any(exam.labels for exam in exams):
        raise ValueError(
            f"choices='auto' finds no labels: the answers are more than {grading.LABELS} different"
            " ones, or there are not ten rows for each"
        )
    tell_what_lacks()
    lines, pairs = [], []
    for exam in exams:
        results = [ask(*model, exam.rows, exam.labels, s, exam.elected) for model in models]
        lines += (found := list(grading.written_down(exam, results[0])))
        pairs += grading.pairs(exam, found)
        print("", exam.title(s.split), *grading.table(exam, results[0]), sep="\n")
        if len(models) == 2:
            same_tokens = models[0][1].digest() == models[1][1].digest()
            print(*grading.comparison(exam, *results, same_tokens), sep="\n")
    write_lines(file, lines)
    if s.pairs and not pairs:
        raise ValueError(
            f"pairs={s.pairs!r} is not written: no answer was wrong; draw some more"
            " with a --temperature above 0, or of more rows"
        )
    if s.pairs:
        write_lines(Path(s.pairs), pairs)


def label(s, model: GPT, tokenizer: Tokenizer, file: Path) -> None:
    """Answers the rows of the file `s.label`, and writes them with the probability of the answer:
    `prepare.py --above=0.9` takes those of which the model was sure (pseudo-labels, Lee 2013)."""
    rows = list(unanswered(Path(s.label)))
    if not rows:
        raise ValueError(f"{s.label} is empty: it should have rows to answer")
    choices = choices_of(s)
    if choices == ["auto"]:
        raise ValueError("choices='auto' needs a training split to find labels in: name them")
    result = ask(model, tokenizer, rows, choices, s)
    said = zip(rows, result.answers, result.probabilities, strict=True)
    write_lines(file, [labelled(*found) for found in said])


def labelled(row: Row, answer: str, probability: float) -> dict:
    """A row with an answer, as prepare.py reads it."""
    messages = [*row.messages, dict(role="assistant", content=answer)]
    return dict(messages=messages, task=row.task, probability=probability)


def unanswered(path: Path) -> Iterator[Row]:
    """The rows of a jsonl file; an answer at the end is left out. Raises ValueError."""
    with open(path, "rb") as f:
        for where, row in tables.jsonl(f, path, "utf-8"):
            try:
                if isinstance(row, ValueError):
                    raise row
                if row["messages"][-1]["role"] == "assistant":
                    row["messages"].pop()
                row["messages"].append(dict(role="assistant", content="?"))
                sound = tables.document(row, tables.Reading())
                yield Row(sound.task, sound.messages[:-1], "")
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                such = '{"messages": [{"role": "user", "content": "..."}]}'
                raise ValueError(f"{where}: no row such as {such} ({e!r:.90})") from e


def variety(s, model: GPT, tokenizer: Tokenizer, split: Split, file: Path) -> None:
    """Draws texts, writes them, and prints how varied they are beside human ones as long.

    Whoever lowers the temperature gets likelier texts and duller ones, so both have to be looked at
    (arXiv:1811.02549).
    """
    most = min(s.max_tokens or SAMPLE_TOKENS, model.config.block_size)
    prompts = [tokenizer.encode_prompt("")] * s.generate
    drawn = written(model, tokenizer, prompts, most, s, s.temperature or 1.0)
    starts = np.linspace(0, max(0, split.tokens - most), len(drawn)).astype(int)
    human = [split.read(int(i), most)[: len(ids)] for i, ids in zip(starts, drawn, strict=True)]
    human = [ids[ids != tokenizer.end_of_text].tolist() for ids in human]
    texts = [[tokenizer.decode(ids) for ids in some] for some in (drawn, human)]
    tell_what_lacks()
    print("", *grading.variety(*texts), sep="\n")
    write_lines(file, [dict(text=text) for text in texts[0]])


def tell_what_lacks() -> None:
    for package in grading.lacking():
        print(f"{package} is not installed (pip install {package}): its scores are left out")


def answers_file(asked: str, model: Path, name: str) -> Path:
    """Where to write: by default the folder of the run, or of a model that belongs to none."""
    of_run = model in checkpoints(model.parent)
    return Path(asked) if asked else (model.parent if of_run else model) / name


def choices_of(s) -> list[str]:
    return s.choices.split(",") if s.choices else []


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_durably(file, text.encode(errors="replace"))
    print(f"\nwrote {file}: {text.count(chr(10)):,} lines")


def ready(model: GPT, here: Machine, s, quantize: str = "") -> GPT:
    """The model, made to answer many prompts at once as fast as it can."""
    model = model.eval().to(here.device, here.dtype)
    machine.use_threads(s.threads, here, model, s.slots)
    return inference.ready(model, quantize, rows=s.slots, parts=s.fast)


def rows_of(split: Split, limit: int = 0, task: str = "") -> dict[str, list[Row]]:
    """The rows of each task, or of one; at most `limit` of each, evenly spread."""
    found: dict[str, list[Rows]] = defaultdict(list)
    for part in split.parts:
        if isinstance(part, Rows):
            found[part.task].append(part)
    rows: dict[str, list[Row]] = defaultdict(list)
    for parts in found.values():
        places = np.concatenate([part.places for part in parts])  # where each row is, in its part
        of = np.repeat(range(len(parts)), [len(part.places) for part in parts])
        kept = min(limit or len(places), len(places))
        for i in (n * len(places) // kept for n in range(kept)):
            ids = parts[of[i]].strip.read(*places[i].tolist())
            name, messages = split.tokenizer.decode_row(ids.tolist())
            last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
            rows[name].append(Row(name, messages[:last], messages[last]["content"]))
    if task and task not in rows:
        there = ", ".join(name or "no task: leave it out" for name in rows)
        raise ValueError(f"task={task!r} is not in the data: there is {there}")
    return {task: rows[task]} if task else dict(rows)


# --- asking


def ask(
    model: GPT, tokenizer: Tokenizer, rows: list[Row], labels: list[str], s, elected=None
) -> Result:
    """Lets a model answer `rows` with one of `labels`, if there are any, or in its own words: of
    `s.vote` answers to a row it gives the one that is `elected`.

    A prompt loses its front only where the context ends before the reference, or a label, would;
    what is written there ends with the context, too.
    """

    def with_end(ids: list[int]) -> list[int]:
        return [*ids, tokenizer.markers.end]

    block_size = model.config.block_size
    references = [with_end(tokenizer.encode(row.reference)) for row in rows]
    choices = [with_end(tokenizer.encode(label)) for label in labels]
    most = s.max_tokens or max(map(len, references)) + LONGER
    rooms = [max(map(len, [ids, *choices])) for ids in references]
    if not labels and not any(row.reference for row in rows):  # nobody knows how long answers are
        most = s.max_tokens or block_size // 2
        rooms = [min(most, block_size // 2)] * len(rows)
    prompts, shorter = prompts_of(model, tokenizer, rows, s.marker, s.noise, rooms)
    left = [block_size + 1 - len(prompt) for prompt in prompts]
    known = [[ids[:room]] for ids, room in zip(references, left, strict=True)]
    cut = sum(len(ids) > room for ids, room in zip(references, left, strict=True))
    if shorter or cut:
        what = f"{shorter:,} prompts lose their front, {cut:,} references their end"
        print(f"block_size={block_size}: of {len(rows):,} rows, {what}")
    tokens = [len(ids) for [ids] in known]
    nats = [found for [found] in surprise(model, tokenizer, prompts, known)]
    exchanged = []
    if s.exchange:
        others, _ = prompts_of(model, tokenizer, rows[1:] + rows[:1], s.marker, s.noise, rooms)
        exchanged = [found for [found] in surprise(model, tokenizer, others, known)]
    if labels:
        ln_p = -torch.tensor(surprise(model, tokenizer, prompts, [choices] * len(prompts)))
        if s.normalise:
            ln_p /= torch.tensor([len(ids) for ids in choices])
        best = ln_p.softmax(dim=1).max(dim=1)
        said = [labels[i] for i in best.indices]
        return Result(said, best.values.tolist(), nats, tokens, exchanged)
    each = s.vote or 1
    found = written(model, tokenizer, prompts, most, s, s.temperature, each)
    if s.vote:
        said = [tokenizer.decode(ids) for ids in found]
        found = [found[i + elected(said[i : i + each])] for i in range(0, len(found), each)]
    limits = [min(most, room) for room in left]
    ended = [[with_end(ids)[:n]] for ids, n in zip(found, limits, strict=True)]
    likely = [math.exp(-cost) for [cost] in surprise(model, tokenizer, prompts, ended)]
    return Result([tokenizer.decode(ids) for ids in found], likely, nats, tokens, exchanged)


def prompts_of(
    model: GPT, tokenizer: Tokenizer, rows: list[Row], marker: str, noise: float, rooms: list[int]
) -> tuple[list[list[int]], int]:
    """The ids of each prompt, and how many of them lose their front.

    Behind it there is room for so many tokens of an answer; for half a context, if not even the
    markers would stand before them. `marker` is asked under instead of the row's own task; "none"
    is no marker. `noise` is the share of letters that are mistyped. Raises ValueError.
    """
    prompts, shorter, block_size = [], 0, model.config.block_size
    for row, room in zip(rows, rooms, strict=True):
        task = {"": row.task, "none": ""}.get(marker, marker)
        asked = mistyped_prompt(row.messages, noise) if noise else row.messages
        ids = np.array(tokenizer.encode_row(asked, task, open=True))
        fitted = fit(ids, block_size + 1 - room, tokenizer.markers)
        if not len(fitted):
            fitted = fit(ids, block_size + 1 - block_size // 2, tokenizer.markers)
        if not len(fitted):
            raise ValueError(f"a context of {block_size} tokens has no room for {row.asked[:60]!r}")
        prompts.append(fitted.tolist())
        shorter += len(fitted) < len(ids)
    return prompts, shorter


def written(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    most: int,
    s,
    temperature: float,
    each: int = 1,
) -> list[list[int]]:
    """The ids of `each` answers to each prompt, many at a time; by beam search one by one."""
    count = len(prompts)
    keys = [k * count + i for i in range(count) for k in range(each)]  # 16 are the first of 32
    prompts = [prompt for prompt in prompts for _ in range(each)]
    found: list[list[int]] = [[] for _ in prompts]
    options = dict(slots=s.slots, seed=s.seed, temperature=temperature, keys=keys)
    stream = answers(model, tokenizer, prompts, most, **options)
    if s.beam > 1:
        numbered = enumerate(prompts)
        options = dict(width=s.beam, length_penalty=s.length_penalty)
        stream = ((i, beam(model, tokenizer, prompt, most, **options)) for i, prompt in numbered)
    with Progress("answering", len(prompts), unit=1, name=" prompts") as progress:
        for done, (i, ids) in enumerate(stream, start=1):
            found[i] = ids
            progress(done)
    return found


@torch.inference_mode()
def surprise(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], choices: list[list[list[int]]]
) -> list[list[float]]:
    """-ln p of each choice (ids) behind its prompt; all prompts have equally many."""
    found: list[list[float]] = [[] for _ in prompts]
    each, T = len(choices[0]), max(len(ids) for some in choices for ids in some)
    most = LOGITS // (each * T * model.config.vocab_size)
    whole = [ids + max(some, key=len) for ids, some in zip(prompts, choices, strict=True)]
    done = 0
    with Progress("scoring", len(prompts), unit=1, name=" prompts") as progress:
        for some in by_length(whole, lambda n: min(most, EVAL_TOKENS // (each * n))):
            both = [prompts[i] for i in some], [choices[i] for i in some]
            for i, nats in zip(some, one_pass(model, tokenizer, *both).tolist(), strict=True):
                found[i] = nats
            done += len(some)
            progress(done)
    return found


def by_length(prompts: list, most: Callable[[int], int]) -> Iterator[list[int]]:
    """Numbers of prompts of about one length, the longest first, for a pass each: `most` of them,
    given the longest."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        some = order[-max(1, most(len(prompts[order[-1]]))) :]
        del order[-len(some) :]
        yield some


def one_pass(model: GPT, tokenizer: Tokenizer, prompts: list, choices: list) -> Tensor:
    """As `surprise`, (prompts, choices of each). A prompt is read once for all of its choices."""
    each = len(choices[0])
    flat = [ids for some in choices for ids in some]  # N of them
    T = max(len(ids) for ids in flat)
    device = model.wte.weight.device
    ids = torch.tensor([ids + [0] * (T - len(ids)) for ids in flat], device=device)  # (N, T)
    counted = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in flat], device=device)
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + T)
    first = prefill(model, prompts, cache, tokenizer.markers)  # (prompts, V)
    repeated = [i for i in range(len(prompts)) for _ in range(each)]
    logits = first[repeated][:, None]  # (N, 1, V)
    if T > 1:
        cache.take(repeated)
        at = cache.lengths[:, None] + torch.arange(T - 1)  # what fills up may exceed the context
        at = at.clamp(max=model.config.block_size - 1).to(device)
        rest = model.logits(model.trunk(ids[:, :-1], positions=at, cache=cache))  # (N, T - 1, V)
        logits = torch.cat([logits, rest], dim=1)
    ln_p = logits.float().log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]  # (N, T)
    return -(ln_p * counted).sum(dim=1).view(-1, each)
