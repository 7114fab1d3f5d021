"""What answers are worth: figures that suit the task, their intervals, and floors beside them.

    labels    few different answers: accuracy, and the mean of the labels' F1
    checked   a built-in task that works each answer out by itself, such as sums: exact match
    texts     all others: exact match, BLEU, chrF, ROUGE

and of all of them the perplexity of the references. A figure alone says little: where nine of ten
answers are "yes", 90% is nothing. So what needs no understanding answers the same prompts: the most
frequent answer; naive Bayes for labels; the prompt or its beginning, copied, for texts. All that
they know is from the training split.

Intervals are by row, as if no two were related; by group (file, story, number) for built-in tasks
that have some, since the rows of a file are right or wrong together.
"""

import importlib.util
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import scores
import tasks
from scores import NaiveBayes, Score

LABELS = 50  # different answers at most, with ten rows for each: then they are labels


class Row(NamedTuple):
    task: str
    messages: list[dict]  # the turns before the answer
    reference: str

    @property
    def prompt(self) -> str:
        return "\n".join(turn["content"] for turn in self.messages)

    @property
    def asked(self) -> str:
        """The last turn alone."""
        return self.messages[-1]["content"] if self.messages else ""


class Result(NamedTuple):
    """What a model made of the rows of a task."""

    answers: list[str]
    probabilities: list[float]  # of its answers, as it sees them
    nats: list[float]  # of the references: -ln p
    tokens: list[int]  # of the references, with their ends
    exchanged: list[float]  # nats of the references behind the prompt of another row, if asked for


class Exam:
    """The rows of a task, what is measured of it, and `learned`: rows from which floors learn.

    `choices` are labels, or auto for those of the training split, where they are few. A task that
    is `built_in` is checked by its own file; `groups` has the group of a row by its prompt. Raises
    ValueError if an answer is not among the choices.
    """

    def __init__(
        self,
        rows: list[Row],
        learned: list[Row],
        choices: list[str],
        built_in: bool,
        groups: dict[str, str],
    ):
        self.task, self.rows, self.learned = rows[0].task, rows, learned
        names = [groups.get(row.prompt, i) for i, row in enumerate(rows)]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.groups = [numbers[name] for name in names]
        self.references = [row.reference for row in rows]
        self.module = tasks.find(self.task) if built_in else None
        there = sorted({row.reference for row in learned})
        few = 0 < len(there) <= min(LABELS, len(learned) // 10)
        self.labels = choices
        if choices == ["auto"]:
            self.labels = there if few else []
        elif choices:
            for answer in self.references:
                if answer not in choices:
                    what = f"{answer[:60]!r} is an answer to {self.task or 'a row'}"
                    raise ValueError(f"{what}, but not among the choices {','.join(choices)}")
        if self.labels or few:
            self.kind = "labels"
        elif self.module and all(self.module.right(row.prompt, row.reference) for row in rows):
            self.kind = "checked"
        else:
            self.kind = "texts"

    def title(self, split: str) -> str:
        """What was asked, and from what the floors have learned."""
        groups = len({*self.groups})
        title = f"{self.task or 'rows'}: {len(self.rows):,} rows of the {split} split"
        if groups < len(self.rows):
            title += f" in {groups:,} groups"
        title += f", floors from {len(self.learned):,} of train"
        lacks = {row.reference for row in self.learned} - {*self.references}
        if self.kind == "labels" and lacks:
            title += f"; NO ROW of {', '.join(sorted(lacks))}"
        return title

    def elected(self, said: list[str]) -> int:
        """The number of the answer that is most like the others, by what counts in the task."""
        return scores.elected(said, scores.overlap if self.kind == "texts" else scores.same)

    def figures(self, said: list[str]) -> dict[str, Score]:
        """As `by_row`, with the rows of a group as one."""
        found = self.by_row(said).items()
        return {name: score.grouped(self.groups) for name, score in found}

    def by_row(self, said: list[str]) -> dict[str, Score]:
        """By name, without those whose packages lack (see `lacking`)."""
        right = scores.exact(said, self.references)
        if self.module:
            both = zip(self.rows, said, strict=True)
            right = [self.module.right(row.prompt, text, row.reference) for row, text in both]
        if self.kind == "labels":
            f1 = scores.macro_f1(said, self.references)
            return {"accuracy": scores.mean(right), "macro-F1": f1}
        found = {"exact match": scores.mean(right)}
        if self.kind == "texts" and "sacrebleu" not in lacking():
            found["BLEU"] = scores.bleu(said, self.references)
            found["chrF"] = scores.chrf(said, self.references)
        if self.kind == "texts" and "rouge_score" not in lacking():
            found |= scores.rouge(said, self.references)
        return found

    def all_figures(self, result: Result) -> dict[str, Score]:
        """Also how well a model knows the references."""
        found = self.figures(result.answers)
        surprise = {"perplexity": result.nats, "prompts exchanged": result.exchanged}
        for name, nats in surprise.items():
            if nats:
                found[name] = scores.perplexity(nats, result.tokens).grouped(self.groups)
        return found

    def floors(self) -> dict[str, list[str]]:
        """By name, answers that need no understanding."""
        known = [row.reference for row in self.learned]
        if not known:
            return {}
        found = {"most frequent": [scores.most_frequent(known)] * len(self.rows)}
        if self.kind == "labels":
            bayes = NaiveBayes([row.prompt for row in self.learned], known)
            return found | {"naive Bayes": [bayes(row.prompt) for row in self.rows]}
        copies = {"prompt": str}
        if self.kind == "texts":
            count = int(median(len(scores.WORDS.findall(text)) for text in known))
            copies["first line"] = scores.first_line
            copies[f"{count} words"] = lambda text: scores.first_words(text, count)
        copies |= getattr(self.module, "FLOORS", {})
        return found | {n: [copy(row.asked) for row in self.rows] for n, copy in copies.items()}


def lacking() -> list[str]:
    """Packages that are not installed; what needs them is left out."""
    wanted = ("sacrebleu", "rouge_score")
    return [package for package in wanted if not importlib.util.find_spec(package)]


def variety(drawn: list[str], human: list[str]) -> Iterator[str]:
    """Lines: how varied texts are that a model has drawn, beside human ones."""
    figures = {"distinct-1": lambda texts: scores.distinct(texts, 1)}
    figures["distinct-2"] = lambda texts: scores.distinct(texts, 2)
    figures["repetition"] = scores.repetition
    if "sacrebleu" not in lacking():
        figures["self-BLEU"] = scores.self_bleu
    lines = [[name, f"{f(drawn):.1f}", f"{f(human):.1f}"] for name, f in figures.items()]
    yield from aligned([["", "drawn", "human"], *lines])


def table(exam: Exam, result: Result) -> Iterator[str]:
    """Lines: each figure with its interval, what the floors reach, and by how much it is above the
    best of them."""
    floors = {name: exam.figures(said) for name, said in exam.floors().items()}
    lines = [["", "model", "95% interval", *floors, "above the best" if floors else ""]]
    for name, score in exam.all_figures(result).items():
        low, high = scores.interval(scores.resampled(score))
        line = [name, f"{score.value:.2f}", f"{low:.2f} to {high:.2f}"]
        beside = [found[name] for found in floors.values() if name in found]
        line += [f"{floor.value:.1f}" for floor in beside] or [""] * len(floors)
        line.append("")
        if beside:
            best = max(beside, key=lambda floor: floor.value)
            gap, low, high, _ = scores.compared(score, best)
            line[-1] = f"{gap:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(line)
    yield from aligned(lines)


def comparison(exam: Exam, result: Result, other: Result, same_tokens: bool) -> Iterator[str]:
    """Lines: another model's figures, and whether the two differ."""
    lines = [["compared with", "baseline", "difference", "95% interval", ""]]
    theirs = exam.all_figures(other)
    for name, score in exam.all_figures(result).items():
        if same_tokens or name not in ("perplexity", "prompts exchanged"):  # these count tokens
            gap, low, high, verdict = scores.compared(score, theirs[name])
            interval = f"{low:+.2f} to {high:+.2f}"
            lines.append([name, f"{theirs[name].value:.2f}", f"{gap:+.2f}", interval, verdict])
    yield from aligned(lines)


def aligned(lines: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def written_down(exam: Exam, result: Result) -> Iterator[dict]:
    """An object for each row: what was asked, answered and wanted, and how good it is."""
    figures = exam.by_row(result.answers).items()
    of_rows = {name: score.rows[:, 0] for name, score in figures if score.figure is scores.ratio}
    for i, row in enumerate(exam.rows):
        found = dict(task=row.task, prompt=row.prompt, answer=result.answers[i])
        found |= dict(reference=row.reference, probability=result.probabilities[i])
        found |= {name: float(values[i]) for name, values in of_rows.items()}
        yield found | dict(nats=result.nats[i], tokens=result.tokens[i])


def pairs(exam: Exam, lines: list[dict]) -> Iterator[dict]:
    """The reference and what was answered instead, of each of the `lines` of `written_down` that is
    wrong: what objectives/preference.py learns from. Nothing said is nothing to learn from."""
    right = "accuracy" if exam.kind == "labels" else "exact match"
    for row, line in zip(exam.rows, lines, strict=True):
        if not line[right] and line["answer"].strip():
            both = dict(chosen=row.reference, rejected=line["answer"])
            yield dict(messages=row.messages, task=row.task) | both
