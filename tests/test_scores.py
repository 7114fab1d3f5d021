"""Figures as one computes them by hand; intervals that hold the truth; floors that learn."""

import importlib.util
import math
import random

import numpy as np
import pytest

import scores
from scores import NaiveBayes, Score

needs_sacrebleu = pytest.mark.skipif(
    not importlib.util.find_spec("sacrebleu"), reason="sacrebleu is not installed"
)
needs_rouge = pytest.mark.skipif(
    not importlib.util.find_spec("rouge_score"), reason="rouge-score is not installed"
)


def test_exact_match_compares_all_but_white_space():
    answers = ["a  b\n", "a b c", "A b", ""]
    assert scores.exact(answers, ["a b", "a b", "a b", "a b"]) == [True, False, False, False]
    assert scores.mean([True, False, False, False]).value == 25


def test_macro_f1_counts_each_label_the_same():
    """x: said 3, true 3, hits 2, so 4/6; y: said 0, true 1, so 0; what is no label is a miss."""
    answers, references = ["x", "x", "?", "x"], ["x", "x", "x", "y"]
    assert scores.macro_f1(answers, references).value == pytest.approx(100 * (4 / 6 + 0) / 2)
    assert scores.macro_f1(references, references).value == 100
    assert scores.macro_f1(["a b", "c"], ["a  b ", "c\n"]).value == 100  # white space is none


def test_perplexity_is_a_mean_over_tokens_and_not_over_rows():
    found = scores.perplexity([2.0, 10.0], [1, 3])
    assert found.value == pytest.approx(math.exp(12 / 4))


def test_an_interval_of_accuracy_is_that_of_the_binomial():
    """Of 400 rows at 75%, the standard error is sqrt(0.75 * 0.25 / 400) = 2.17 points."""
    score = scores.mean([True] * 300 + [False] * 100)
    low, high = scores.interval(scores.resampled(score))
    assert low == pytest.approx(75 - 1.96 * 2.165, abs=0.6)
    assert high == pytest.approx(75 + 1.96 * 2.165, abs=0.6)
    assert scores.interval(scores.resampled(score)) == (low, high)


def test_rows_of_one_group_are_drawn_together():
    """Ten groups of 40 equal rows say as much as ten rows: sqrt(0.25 / 10) = 15.8 points."""
    score = scores.mean([i % 2 == 0 for i in range(10) for _ in range(40)])
    grouped = score.grouped([i for i in range(10) for _ in range(40)])
    assert grouped.value == score.value == 50
    assert scores.resampled(grouped).std() == pytest.approx(15.8, rel=0.1)
    assert scores.resampled(score).std() == pytest.approx(2.5, rel=0.1)


def test_figures_drawn_in_blocks_are_a_thousand(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 300)
    found = scores.resampled(scores.mean([True, False] * 50))  # 3 at once, and 334 times 3 is 1002
    assert len(found) == 1000
    assert found.std() == pytest.approx(5, rel=0.1) and len(set(found)) > 20


def test_an_interval_leaves_out_a_fortieth_at_each_end():
    assert scores.interval(np.arange(1001)) == (25, 975)


def test_the_95_percent_interval_holds_the_truth_about_19_times_of_20():
    rng, held = random.Random(0), 0
    for _ in range(100):
        found = scores.mean([rng.random() < 0.6 for _ in range(200)])
        low, high = scores.interval(scores.resampled(found))
        held += low <= 60 <= high
    assert 88 <= held <= 100


def test_a_paired_comparison_sees_what_two_intervals_do_not():
    """b is right wherever a is, and on 12 more of 400: each interval is some 4 points wide."""
    a = scores.mean([True] * 200 + [False] * 200)
    b = scores.mean([True] * 212 + [False] * 188)
    gained, low, high, verdict = scores.compared(b, a)
    assert gained == 3 and 0 < low < 3 < high < 6 and verdict == "they differ"
    assert scores.interval(scores.resampled(a))[1] > b.value
    assert scores.compared(a, a) == (0, 0, 0, "no difference is shown")


def test_the_figure_of_resampled_rows_is_computed_anew():
    """Not averaged: of one row in ten drawn with replacement, the ratio of sums is never 0.5."""
    score = Score(np.array([[1.0, 1.0], [0.0, 3.0]]), lambda sums: sums[0] / sums[1])
    assert set(np.round(scores.resampled(score), 3)) == {0, 0.25, 1}


@needs_sacrebleu
def test_bleu_of_the_papers_example_and_of_equal_texts():
    """Papineni 2002: two of seven "the" count; no pair does: sacrebleu takes a half, a quarter."""
    references = ["The cat is on the mat ."]
    assert scores.bleu(references, references).value == pytest.approx(100)
    found = scores.bleu(["the the the the the the the"], ["the cat is on the mat"])
    precisions = [2 / 7, 0.5 / 6, 0.25 / 5, 0.125 / 4]
    assert found.value == pytest.approx(100 * math.prod(precisions) ** 0.25)


@needs_sacrebleu
def test_bleu_and_chrf_of_many_rows_are_those_of_sacrebleu():
    import sacrebleu

    answers = ["a man walks his dog .", "two birds", "she reads a long book", ""]
    references = ["a man walks a dog .", "two small birds fly", "she reads a book", "nothing"]
    ours = scores.bleu(answers, references).value, scores.chrf(answers, references).value
    bleu = sacrebleu.corpus_bleu(answers, [references]).score
    assert ours == pytest.approx((bleu, sacrebleu.corpus_chrf(answers, [references]).score))


@needs_sacrebleu
def test_chinese_is_compared_by_characters():
    assert scores.bleu(["他今天去上海。"], ["他今天去北京。"]).value > 30
    assert (scores.cut_of(["ab", "中"]), scores.cut_of(["für é"])) == ("zh", "13a")


@needs_rouge
def test_rouge_by_hand():
    """Of "the cat sat down" and "the cat lay down": 3 of 4 words, 1 of 3 pairs, 3 in order."""
    found = scores.rouge(["the cat sat down"], ["The cat lay down."])
    values = [found[name].value for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L")]
    assert values == pytest.approx([75, 100 / 3, 75])


@needs_rouge
@pytest.mark.parametrize(
    "answer, reference",
    [
        ("去上海", "去北京"),
        ("кот видел пса", "Кот ел рыбу"),
        ("η γάτα κοιμάται", "Η πόλη καίγεται"),
        ("ねすき", "ねむい"),
        ("고양이 가 잔다", "고양이 는 먹는다"),
        ("القط نام هنا", "القط أكل السمك"),
    ],
)
def test_rouge_finds_one_word_of_three_in_any_script(answer, reference):
    assert scores.rouge([answer], [reference])["ROUGE-1"].value == pytest.approx(100 / 3)


@needs_rouge
def test_overlap_is_rouge_l():
    draw = random.Random(1)
    for _ in range(50):
        a, b = (" ".join(draw.choices("abcd", k=draw.randint(1, 9))) + "!" for _ in range(2))
        assert 100 * scores.overlap(a, b) == pytest.approx(scores.rouge([a], [b])["ROUGE-L"].value)
    assert scores.overlap("去上海", "去北京") == pytest.approx(1 / 3)
    assert (scores.overlap("", ""), scores.overlap("", "a"), scores.overlap("?", "!")) == (1, 0, 0)


def test_the_most_frequent_of_equal_answers_is_elected():
    assert scores.elected(["7", "12", "8", "12 ", "12"], scores.same) == 1
    assert scores.elected(["3", "4"], scores.same) == 0  # all are alone: the first


def test_the_text_in_the_middle_is_elected():
    """Of x = "a b c", y = "a b d", z = "b d" and "q": x has 2/3 with y and 2/5 with z, y 2/3 and
    4/5, z 2/5 and 4/5. Two that are equal outweigh that, since they agree by 1."""
    texts = ["q", "a b c", "a b d", "b d"]
    assert scores.elected(texts, scores.overlap) == 2
    assert scores.elected([*texts, "q", "q"], scores.overlap) == 0
    assert scores.elected(texts, scores.same) == 0


@pytest.mark.parametrize("package, score", [("sacrebleu", "bleu"), ("rouge_score", "rouge")])
def test_a_package_that_lacks_is_named(package, score, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{package} is not installed: pip install {package}"):
        getattr(scores, score)(["a"], ["a"])


def test_distinct_and_repetition_by_hand():
    """Of "a b a b a b": 6 words, 2 kinds; 5 pairs, 2 kinds; fours abab baba abab: 1 of 3 again."""
    assert scores.distinct(["a b a b a b"], 1) == pytest.approx(100 * 2 / 6)
    assert scores.distinct(["a b a", "b a b"], 2) == pytest.approx(100 * 2 / 4)
    assert scores.repetition(["a b a b a b"]) == pytest.approx(100 / 3)
    assert scores.repetition(["a b c d e", "a b c d e"]) == 0  # of one text, not of all
    assert scores.repetition(["a"]) == scores.distinct([""], 1) == 0


@needs_sacrebleu
def test_self_bleu_is_high_for_texts_alike():
    alike = [
        "the model reads a book today",
        "the model reads a book again",
        "the model reads a book",
    ]
    other = ["the model reads a book today", "we never went so far before", "birds sing at noon"]
    assert scores.self_bleu(alike) > 60 > 10 > scores.self_bleu(other)
    assert scores.self_bleu(["the same words again"] * 2) == pytest.approx(100)


def test_floors_that_copy():
    text = "Two birds fly.\nThey sing."
    assert scores.first_words(text, 2) == "Two birds"
    assert scores.first_words(text, 99) == text
    assert scores.first_words("我去上海了", 2) == "我去"
    assert scores.first_words("", 3) == scores.first_words(text, 0) == ""
    assert scores.first_line(text) == "Two birds fly."
    assert scores.most_frequent(["b", "a", "b"]) == "b"


def test_naive_bayes_by_hand():
    """P(y) = 2/3, P(x) = 1/3; known are good, bad, film and the pairs good film, bad film.

    "bad film": y 2/3 * (1/9) * (3/9) * (1/9), x 1/3 * (2/8) * (2/8) * (2/8): x.
    """
    bayes = NaiveBayes(["good film", "film", "bad film"], ["y", "y", "x"])
    assert bayes("bad film") == "x"
    assert bayes("good film") == "y"
    assert bayes("unknown") == "y"  # the more frequent label
    assert bayes.sizes == {"y": 4 + 5, "x": 3 + 5}
