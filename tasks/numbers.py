"""Numbers below a million in three written forms: translation, with a language that can be checked.

    310502    three hundred ten thousand five hundred two    三十一万零五百零二

The marker names the form that is wanted (numbers_english, numbers_digits, numbers_chinese) and
nothing else does: each form of a prompt is asked for in two others. Six directions, one model; so
does Johnson et al. 2017 (arXiv:1611.04558). A number belongs to one split in all of its forms.

English has no "and", and a hyphen in twenty-one. Chinese groups by ten thousand (万); zeros between
other digits are one 零, those at the end of a group are silent; ten is 十 at the very beginning
(十二, 十万) and 一十 elsewhere (一百一十二); two is always 二.
"""

import random
from collections.abc import Iterator
from itertools import islice, permutations

from tasks import TEST, VAL, distinct, row

FORMS = ("chinese", "digits", "english")
NUMBERS = dict(train=20_000, val=200, test=200)  # each in six rows
WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""
ONES, TENS = WORDS.split()[:20], WORDS.split()[20:]
DIGITS = "零一二三四五六七八九"
VALUES = {word: i for i, word in enumerate(ONES)} | {c: i for i, c in enumerate(DIGITS)}
VALUES |= {word: 10 * i for i, word in enumerate(TENS, start=2)}
UNITS = {"hundred": 100, "十": 10, "百": 100, "千": 1000}  # of the digit before
GROUPS = {"thousand": 1000, "万": 10_000}  # of all that stands before


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """Six rows for each number; half of the numbers are drawn evenly, half by their length."""
    for n in islice(distinct(number, int, split, seed, val, test), NUMBERS[split]):
        for source, target in permutations(FORMS, 2):
            yield row(f"numbers_{target}", write(n, source), write(n, target), group=f"number {n}")


def number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((6, 6, 6, 6, 6, 1, 2, 3, 4, 5)))


def right(prompt: str, answer: str, reference: str = "") -> bool:
    """Whether it is the same number in another form: that of the reference, if there is one."""
    n = read(prompt.strip())
    wanted = [form_of(reference)] if reference else set(FORMS) - {form_of(prompt.strip())}
    return n is not None and answer.strip() in [write(n, form) for form in wanted]


def form_of(text: str) -> str:
    return "chinese" if not text.isascii() else "digits" if text.isdecimal() else "english"


def write(n: int, form: str) -> str:
    return {"digits": str, "english": english, "chinese": chinese}[form](n)


def english(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return f"{english(n // size)} {name}" + (f" {english(n % size)}" if n % size else "")


def chinese(n: int) -> str:
    if n < 10:
        return DIGITS[n]
    high, low = divmod(n, 10_000)
    groups = [(high, "万"), (low, "")] if high else [(low, "")]
    text = ""
    for group, name in groups:
        for digit, unit in zip(f"{group:04}", ("千", "百", "十", ""), strict=True):
            if digit != "0":
                text += DIGITS[int(digit)] + unit
            elif text and not text.endswith(DIGITS[0]):
                text += DIGITS[0]
        text = text.rstrip(DIGITS[0]) + name if name else text.rstrip(DIGITS[0])
    return text.removeprefix("一") if text.startswith("一十") else text


def read(text: str) -> int | None:
    """The number that a text in one of the forms stands for; None if it is not written so."""
    form = form_of(text)
    if form == "digits":
        n = int(text)
    else:
        total = group = digit = 0
        for word in text.replace("-", " ").split() if form == "english" else text:
            if word in UNITS:
                group += (digit or 1) * UNITS[word]
                digit = 0
            elif word in GROUPS:
                total = (group + digit) * GROUPS[word]
                group = digit = 0
            elif word in VALUES:
                digit += VALUES[word]
            else:
                return None
        n = total + group + digit
    return n if n < 10**6 and write(n, form) == text else None
