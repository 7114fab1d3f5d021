"""An exam for an encoder with a decoder: python -m objectives.encoder_decoder RUN --split=test

As evaluate.py with rows: the model answers the prompts of a split, answers.jsonl has them, and
grading.py says what they are worth, beside floors. The encoder reads the prompt once; then the
decoder writes token after token, each the likeliest, with a KV cache of what it has written.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import exam
import grading
from dataset import IGNORE, Dataset
from engine import checkpoint, settings
from engine.learner import Learner, opened
from engine.pipeline import Progress
from engine.settings import Count, Positive
from grading import Exam, Result
from objectives.encoder_decoder import decode


@dataclass
class Settings:
    run: str = "out/encoder_decoder"  # folder of a run, or one checkpoint of it
    data: str = ""  # folder that prepare.py has written; by default that of the run
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    task: str = ""  # only the rows of this task
    limit: Count = 0  # rows of each task, evenly spread; 0 is all
    max_tokens: Count = 0  # of an answer; 0 is a few more than the longest reference
    slots: Positive = 64  # answers that are written side by side
    exchange: bool = False  # also the perplexity of answers behind the prompt of another row
    answers: str = ""  # file to write them to; by default one in the folder of the run


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Let an encoder with a decoder answer rows.", "run")
    learner, tokenizer = opened(s.run, "encoder_decoder")
    data = Dataset(s.data or learner.objective.s.data)
    learner.objective.require(data)
    data.require_tokenizer(tokenizer, s.run)
    learned = exam.rows_of(data.split("train"), exam.FLOOR_ROWS)
    exam.tell_what_lacks()
    lines = []
    for task, rows in exam.rows_of(data.split(s.split), s.limit, s.task).items():
        asked = Exam(rows, learned.get(task, []), [], False, {})
        result = ask(learner, tokenizer, rows, s)
        lines += grading.written_down(asked, result)
        print("", asked.title(s.split), *grading.table(asked, result), sep="\n")
    file = exam.answers_file(s.answers, checkpoint.find(s.run), "answers.jsonl")
    exam.write_lines(file, lines)


@torch.no_grad()
def ask(learner: Learner, tokenizer, rows: list[grading.Row], s) -> Result:
    """Answers of the model to rows, and how likely it finds them and the references."""
    markers, room = tokenizer.markers, learner.gpt.config.block_size
    references = [[*tokenizer.encode(row.reference), markers.end] for row in rows]
    longest = max(map(len, references))
    most = min(s.max_tokens or longest + exam.LONGER, room)
    wanted = [len(ids) for ids in references]
    prompts, shorter = exam.prompts_of(learner.gpt, tokenizer, rows, "", 0.0, wanted)
    rooms = [min(n, room + 1 - len(ids)) for n, ids in zip(wanted, prompts, strict=True)]
    if shorter:
        print(f"block_size={room}: of {len(rows):,} rows, {shorter:,} prompts lose their front")
    found: list[tuple] = [()] * len(rows)
    with Progress("answering", len(rows), unit=1, name=" prompts") as progress:
        for some in exam.by_length(prompts, lambda _: s.slots):
            known = [references[i][: rooms[i]] for i in some]
            read = encoded(learner, [prompts[i][:-1] for i in some])
            nats = surprise(learner, markers.assistant, *read, known)
            said = written(learner, markers, *read, most)
            if s.exchange:
                read = encoded(learner, [prompts[i - 1][:-1] for i in some])
            others = surprise(learner, markers.assistant, *read, known) if s.exchange else nats
            costs = torch.stack([nats, others], dim=1).tolist()
            for i, (ids, ln_p), (mine, other) in zip(some, said, costs, strict=True):
                found[i] = tokenizer.decode(ids), ln_p, mine, rooms[i], other
            progress(sum(map(bool, found)))
    texts, ln_p, nats, tokens, exchanged = map(list, zip(*found, strict=True))
    likely = torch.tensor(ln_p).exp().tolist()
    return Result(texts, likely, nats, tokens, exchanged if s.exchange else [])


def padded(lines: list[list[int]], with_: int = 0) -> Tensor:
    T = max(map(len, lines))
    return torch.tensor([ids + [with_] * (T - len(ids)) for ids in lines])


def encoded(learner: Learner, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The states of the encoder (B, S, C), which of them there are, (B, 1, 1, S) bool, and how many
    each prompt has (B)."""
    tokens = padded(prompts)
    lengths = torch.tensor([len(ids) for ids in prompts])
    seen = (torch.arange(tokens.size(1)) < lengths[:, None])[:, None, None]
    mask = seen.expand(-1, -1, tokens.size(1), -1)
    x = learner.gpt.wte(tokens)
    return learner.heads["encoder"].trunk(tokens, mask, embedded=x), seen, lengths


def surprise(learner: Learner, begin: int, states, seen, lengths, answers) -> Tensor:
    """-ln p of an answer to each prompt: (B)."""
    tokens = padded([[begin, *ids[:-1]] for ids in answers])
    targets = padded(answers, IGNORE)
    T = tokens.size(1)
    at = (lengths[:, None] + torch.arange(T)).clamp(max=learner.gpt.config.block_size - 1)
    cross = seen.expand(-1, -1, T, -1)
    x = decode(learner.gpt, learner.heads["cross"], tokens, at, None, states, cross)
    logits = learner.gpt.logits(x)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets).sum(dim=1)


def written(learner: Learner, markers, states, seen, lengths, most: int) -> list[tuple]:
    """The likeliest token after the other until <|end|>: for each prompt ids, and ln p of them."""
    gpt = learner.gpt
    cache = gpt.new_cache(len(states), most)
    token = torch.full((len(states), 1), markers.assistant)
    going = torch.ones(len(states), dtype=torch.bool)
    ln_p, said = torch.zeros(len(states)), []
    for i in range(most):
        _, mask = cache.begin(1)
        at = (lengths[:, None] + i).clamp(max=gpt.config.block_size - 1)
        x = decode(gpt, learner.heads["cross"], token, at, mask, states, seen, cache)
        cache.lengths += 1
        best = gpt.logits(x[:, -1]).log_softmax(dim=-1).max(dim=-1)
        ln_p += best.values * going
        token = best.indices[:, None]
        said.append(torch.where(going, best.indices, markers.end))
        going &= best.indices != markers.end
        if not going.any():
            break
    rows = torch.stack([*said, torch.full_like(said[0], markers.end)], dim=1).tolist()
    return [(ids[: ids.index(markers.end)], p) for ids, p in zip(rows, ln_p.tolist(), strict=True)]
