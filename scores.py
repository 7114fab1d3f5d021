"""Scores of answers, the floors to put beside them, and how sure a figure is. No torch here.

A figure over rows is a Score: what each row adds, and what makes one number of the sums. So every
figure can be computed anew from rows drawn with replacement, as if the test had been another one of
the same kind (the bootstrap, Efron 1979): between the 2.5th and the 97.5th percentile of a thousand
such figures lies its 95% interval. Rows of one group, such as the snippets of one file, are drawn
together: they are no independent trials. Two systems are compared on the same drawn rows, since a
row that is hard for one is hard for the other (Koehn 2004): they differ if the interval of their
difference leaves out 0. Figures are percentages, but for perplexities.

BLEU (Papineni et al. 2002) asks how many of the answer's words, pairs, triples and fours stand in
the reference, and punishes short answers; chrF (Popović 2015) compares characters; ROUGE (Lin 2004)
words, pairs, and the longest common subsequence. By the packages that published figures come from.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from engine.settings import require_package

RESAMPLES = 1000
BLOCK = 1 << 22  # numbers drawn at once
CHINESE = "\u3040-\u30ff\u3400-\u9fff"  # and kana: no spaces, so a character counts as a word
WORDS = re.compile(rf"[{CHINESE}]|[^\W{CHINESE}]+|[^\w\s]")
MOST_TEXTS = 100  # each is compared with all others


class Score(NamedTuple):
    rows: np.ndarray  # (rows, parts): what each row adds
    figure: Callable[[np.ndarray], float]  # of the sums of the parts

    @property
    def value(self) -> float:
        return self.figure(self.rows.sum(axis=0))

    def grouped(self, groups: Sequence[int]) -> "Score":
        """The same figure with the rows of a group as one; `groups` numbers each row's from 0."""
        rows = np.zeros((max(groups) + 1, self.rows.shape[1]))
        np.add.at(rows, groups, self.rows)
        return Score(rows, self.figure)


# --- how sure


def resampled(score: Score, seed: int = 0) -> np.ndarray:
    """The figures (RESAMPLES,) of rows drawn with replacement: the same rows for the same seed."""
    count = len(score.rows)
    size = max(1, min(RESAMPLES, BLOCK // count))
    blocks = (drawn(count, size, (seed, first)) for first in range(0, RESAMPLES, size))
    sums = np.concatenate([times @ score.rows for times in blocks])[:RESAMPLES]
    return np.array([score.figure(each) for each in sums])


@lru_cache(maxsize=8)  # the figures of a table draw the same
def drawn(count: int, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """How often each of `count` rows comes if as many are drawn, (size, count): `size` times."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(count, size=count) for _ in range(size))
    return np.stack([np.bincount(rows, minlength=count) for rows in draws])


def interval(figures: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(figures, (2.5, 97.5))
    return float(low), float(high)


def compared(a: Score, b: Score) -> tuple[float, float, float, str]:
    """a - b over the same rows, its interval, and what that says."""
    low, high = interval(resampled(a) - resampled(b))
    verdict = "they differ" if low > 0 or high < 0 else "no difference is shown"
    return a.value - b.value, low, high, verdict


# --- figures


def ratio(sums: np.ndarray) -> float:
    return 100 * float(sums[0]) / float(sums[1])


def mean(values: Sequence[float]) -> Score:
    """The mean of numbers from 0 to 1, or of true and false, as a percentage."""
    return Score(np.stack([np.asarray(values, float), np.ones(len(values))], axis=1), ratio)


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> Score:
    """exp(mean surprise of a token), from the sums of rows."""
    rows = np.stack([np.asarray(nats, float), np.asarray(tokens, float)], axis=1)
    return Score(rows, lambda sums: math.exp(sums[0] / sums[1]))


def plain(text: str) -> str:
    """What counts as the same text: white space is not compared."""
    return " ".join(text.split())


def same(a: str, b: str) -> bool:
    return plain(a) == plain(b)


def exact(answers: list[str], references: list[str]) -> list[bool]:
    return [same(a, b) for a, b in zip(answers, references, strict=True)]


def macro_f1(answers: list[str], references: list[str]) -> Score:
    """The mean of the labels' F1, each counting the same however rare: 2 hits / (said + true)."""
    labels = sorted(set(map(plain, references)))
    said, true = (
        np.array([[plain(text) == label for label in labels] for text in texts], float)
        for texts in (answers, references)
    )
    rows = np.concatenate([said * true, said + true], axis=1)

    def figure(sums: np.ndarray) -> float:
        hits, both = np.split(sums, 2)
        drawn = both > 0
        return 100 * float(np.mean(2 * hits[drawn] / both[drawn]))

    return Score(rows, figure)


def cut_of(texts: list[str]) -> str:
    """How sacrebleu should cut them into words."""
    return "zh" if any(re.search(f"[{CHINESE}]", text) for text in texts) else "13a"


def by_sacrebleu(metric, answers: list[str], references: list[str]) -> Score:
    """What each row adds is not public there, but sacrebleu's own significance test uses it too."""
    rows = np.array(metric._extract_corpus_statistics(answers, [references]))
    return Score(rows, lambda sums: metric._compute_score_from_stats(sums.tolist()).score)


def bleu(answers: list[str], references: list[str]) -> Score:
    """Raises ValueError if sacrebleu lacks, as chrf does."""
    require_package("sacrebleu", True)
    from sacrebleu.metrics import BLEU

    return by_sacrebleu(BLEU(tokenize=cut_of(references)), answers, references)


def chrf(answers: list[str], references: list[str]) -> Score:
    require_package("sacrebleu", True)
    from sacrebleu.metrics import CHRF

    return by_sacrebleu(CHRF(), answers, references)


class Words:
    """What rouge-score asks of a tokenizer; its own knows only a to z and digits.

    So it finds no word at all in Greek, and two in "für": this one stands in for any such text.
    """

    def tokenize(self, text: str) -> list[str]:
        return [word for word in WORDS.findall(text.lower()) if word[0].isalnum()]


def rouge(answers: list[str], references: list[str]) -> dict[str, Score]:
    """ROUGE-1, -2 and -L (F1, without stemming). Raises ValueError if rouge-score lacks."""
    require_package("rouge_score", True)
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    beyond = any(not c.isascii() and c.isalpha() for text in references for c in text)
    scorer = RougeScorer(kinds, tokenizer=Words() if beyond else None)
    found = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    names = {kind: f"ROUGE-{kind.removeprefix('rouge')}" for kind in kinds}
    return {names[kind]: mean([row[kind].fmeasure for row in found]) for kind in kinds}


# --- a vote


def elected(answers: list[str], agreement: Callable[[str, str], float]) -> int:
    """The number of the answer with the highest mean `agreement` with the others: the first, if
    there are several. Its range is from 0 to 1, and 1 is for equal texts.

    Of `same` that is the most frequent (self-consistency, arXiv:2203.11171), of `overlap` the one
    in the middle: if each answer is as good a guess of the reference as any other, it loses least
    (minimum Bayes risk, Kumar and Byrne 2004).
    """
    votes = Counter(answers)  # equal ones are compared once; with itself each agrees alike
    sums = {a: sum(n * agreement(a, b) for b, n in votes.items()) for a in votes}
    return answers.index(max(sums, key=sums.get))


def overlap(a: str, b: str) -> float:
    """ROUGE-L of two texts, from 0 to 1: F1 of the longest sequence of words that both have in
    this order, other words between them or not."""
    one, other = (Words().tokenize(text) for text in (a, b))
    lengths = [0] * (len(other) + 1)  # of the longest in what was read of `one`, and other[:j]
    for word in one:
        before = 0
        for j, its in enumerate(other, start=1):
            longer = before + 1 if word == its else max(lengths[j], lengths[j - 1])
            before, lengths[j] = lengths[j], longer
    words = len(one) + len(other)
    return 2 * lengths[-1] / words if words else float(same(a, b))


# --- texts without reference


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = WORDS.findall(text)
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words / all of them (Li et al. 2016): falls with the amount of text."""
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return 100 * len(set(found)) / max(1, len(found))


def repetition(texts: list[str]) -> float:
    """How many of the fours of words have stood in the same text before."""
    found = [ngrams(text, 4) for text in texts]
    return 100 * sum(len(f) - len(set(f)) for f in found) / max(1, sum(map(len, found)))


def self_bleu(texts: list[str]) -> float:
    """The mean BLEU of each text with all others as references (Zhu et al. 2018): high is alike."""
    require_package("sacrebleu", True)
    from sacrebleu.metrics import BLEU

    texts = texts[:MOST_TEXTS]
    metric = BLEU(tokenize=cut_of(texts), effective_order=True)
    found = [metric.sentence_score(t, texts[:i] + texts[i + 1 :]) for i, t in enumerate(texts)]
    return sum(score.score for score in found) / max(1, len(found))


# --- floors


def most_frequent(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def first_words(text: str, count: int) -> str:
    """The first `count` words; characters, where words are not parted by spaces."""
    found = list(WORDS.finditer(text))
    return text[: found[min(count, len(found)) - 1].end()] if found and count else ""


def first_line(text: str) -> str:
    return text.strip().split("\n")[0]


class NaiveBayes:
    """Counts of words and of pairs of neighbours, each taken for independent of the others given
    the label; one is added to each count, so that what was never seen rules nothing out."""

    def __init__(self, texts: list[str], labels: list[str]):
        self.labels = Counter(labels)
        self.counts: defaultdict[str, Counter] = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            self.counts[label].update(self.features(text))
        self.known = set().union(*self.counts.values())
        self.sizes = {
            label: found.total() + len(self.known) for label, found in self.counts.items()
        }

    @staticmethod
    def features(text: str) -> list:
        words = WORDS.findall(text.lower())
        return [*words, *pairwise(words)]

    def __call__(self, text: str) -> str:
        features = [feature for feature in self.features(text) if feature in self.known]

        def log_probability(label: str) -> float:
            counts, size = self.counts[label], self.sizes[label]
            return math.log(self.labels[label]) + sum(
                math.log((counts[feature] + 1) / size) for feature in features
            )

        return max(sorted(self.labels), key=log_probability)
