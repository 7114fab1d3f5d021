"""Samples chosen by a judge of what is human: python rerank.py out/small --judge=out/judge

A classifier that tells human text from a writer's own knows something that the writer does not. For
the best one s(x) = ln p(human | x) / p(machine | x) is ln p_human(x) / p_writer(x), so

    p(x) = p_writer(x) exp(s(x)) / Z                       (residual energy: arXiv:2004.11714)

would be human text itself. Nobody can draw from that, but of k samples of the writer one can be
drawn with probabilities in proportion to exp(s): the more samples, the nearer. The judge learns
from rows that this command writes as well, of a text that goes on by itself or by the writer:

    python rerank.py out/small --samples=1 --out=raw.jsonl
    python prepare.py raw.jsonl --out=data/raw --tokenizer=out/small
    python train.py --objective=classify --data=data/raw --init_from=out/small --out=out/judge

A small one learns by --pool=mean, from thousands of rows, and not by the last state:
docs/objectives.md.

Is re-ranked text harder to tell? That is for a fresh judge to say, which learns from its rows.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import objectives
import scores
from dataset import Dataset
from engine import settings
from engine.settings import Count, NotNegative, Positive
from grading import aligned

HUMAN, MACHINE = "human", "machine"  # the labels


@dataclass
class Settings:
    run: str = "out/small"  # the writer: folder of a run, or one checkpoint of it
    judge: str = ""  # run of objective=classify that chooses; without one the first sample is taken
    data: str = ""  # folder of text that is continued; by default that of the run
    split: Literal["train", "val", "test"] = "train"  # which part of it
    rows: Positive = 1000  # beginnings, evenly spread: each becomes one human row and one machine's
    given: Positive = 32  # tokens of a beginning
    tokens: Positive = 32  # that are written behind it
    samples: Positive = 16  # for each beginning, to choose from
    keep: Literal["drawn", "best"] = "drawn"  # by exp(score), or that of the highest score
    temperature: NotNegative = 1.0  # of the samples
    slots: Positive = 32  # samples that are written side by side
    seed: Count = 1  # of all that is drawn
    out: str = "rows.jsonl"  # file to write
    device: settings.Device = "auto"  # of the writer: auto, cpu, mps, cuda
    dtype: settings.DType = "auto"  # of its matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the work
    fast: bool = True  # parts that compute the same as model.py, faster; false runs model.py itself


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Continue texts, and choose.", "run")
    chosen = s.samples == 1 or s.judge
    settings.require(chosen, s, "samples", "1 without --judge, which chooses among them")

    import exam
    from engine import machine
    from engine.learner import Opened
    from generate import answers
    from judge import Judge

    run = Opened(s.run)
    model, tokenizer = run.model, run.tokenizer
    objectives.require_writer(run.state, s.run)
    data = Dataset(*run.folder(s))
    data.require_tokenizer(tokenizer, s.run)
    if data.kind != "text":
        raise ValueError(f"{data.folder} holds rows, and what is continued is text: --data=TEXT")
    room = model.config.block_size + 1
    settings.require(s.given + s.tokens <= room, s, "given", f"at most {room - s.tokens} here")
    judge = Judge(s.judge) if s.judge else None
    if judge and {*judge.labels} != {HUMAN, MACHINE}:
        raise ValueError(f"judge={s.judge!r} tells {', '.join(judge.labels)}, not human or machine")

    # 1. texts of people, each cut into a beginning and what came next
    human = spans(data.split(s.split), s.rows, s.given + s.tokens, tokenizer.end_of_text)
    prompts = [ids[: s.given] for ids in human for _ in range(s.samples)]

    # 2. what the writer makes of the beginnings; samples that end early are none
    here = machine.pick(s.device, s.dtype, "false", s.slots, model.config.parameters())
    model = exam.ready(model, here, s)
    drawn = defaultdict(list)
    options = dict(slots=s.slots, seed=s.seed, temperature=s.temperature)
    for number, ids in sorted(answers(model, tokenizer, prompts, s.tokens, **options)):
        if len(ids) == s.tokens:
            drawn[number // s.samples].append(ids)

    # 3. one of them, as the judge finds them, and the rows
    lines, texts = [], defaultdict(list)
    for i, some in drawn.items():
        begun = human[i][: s.given]
        whole = [tokenizer.decode(begun + ids) for ids in some]
        kept = choose(judge, whole, s, i) if judge else 0
        for label, text in ((HUMAN, tokenizer.decode(human[i])), (MACHINE, whole[kept])):
            turns = [dict(role="user", content=text), dict(role="assistant", content=label)]
            lines.append(dict(messages=turns, group=str(i)))
        texts["kept"].append(tokenizer.decode(some[kept]))
        texts["first"].append(tokenizer.decode(some[0]))
        texts["human"].append(tokenizer.decode(human[i][s.given :]))
    print(f"{len(drawn):,} beginnings; what was written behind them:", *varied(texts), sep="\n")
    exam.write_lines(Path(s.out), lines)


def spans(split, count: int, length: int, end_of_text: int) -> list[list[int]]:
    """Texts of `length` tokens, evenly spread, none across the end of a document."""
    step = max(length, split.tokens // count)
    found = [split.read(i, length).tolist() for i in range(0, split.tokens - length + 1, step)]
    found = [ids for ids in found if end_of_text not in ids][:count]
    if not found:
        raise ValueError(f"no document has {length} tokens: use a smaller --given or --tokens")
    return found


def choose(judge, texts: list[str], s: Settings, number: int) -> int:
    """Which of the samples is kept: drawn in proportion to p(human) / p(machine), or the best."""
    p = judge([judge.of_text(text) for text in texts])
    odds = p[:, judge.labels.index(HUMAN)] / p[:, judge.labels.index(MACHINE)].clip(min=1e-12)
    if s.keep == "best":
        return int(odds.argmax())
    sums = odds.cumsum()
    at = np.random.default_rng((s.seed, number)).random() * sums[-1]
    return min(int(np.searchsorted(sums, at, side="right")), len(texts) - 1)


def varied(texts: dict[str, list[str]]):
    """Lines: how varied the kept ones are, the first sample of each, and the human ones."""
    lines = [["", *texts]]
    for n in (1, 2, 3):
        figures = (f"{scores.distinct(some, n):.1f}" for some in texts.values())
        lines.append([f"distinct-{n}", *figures])
    yield from aligned(lines)


if __name__ == "__main__":
    settings.run(main)
