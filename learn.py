"""Learn how a GPT works, here: python learn.py 4

    python learn.py 4                       chapter 4, attention: predict, see, compare
    python learn.py 4 --answer=0.3,64,1,a   the predictions, where nobody sits at a terminal
    python learn.py 4 --language=zh         中文；LANG=zh_CN.UTF-8 的机器上不用写
    python learn.py 4 --check=my_model.py   do the exercises of the chapter come out right?

Each chapter is a page of docs/learn, and asks what will happen before it runs the real code, with
real numbers. Those who predict learn more than those who only read, even when they are wrong
(Richland et al. 2009). A file to be checked is a copy of the chapter's file of the book with
something changed, or no more than what is changed. The files in lessons/ import the book and copy
nothing of it.
"""

import io
import os
import re
import sys
import unicodedata
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import lessons
from engine import settings
from lessons import languages

PREDICT, RIGHT, WRONG, IS = "? ", "✓", "✗", "="  # signs, which no language has to translate


@dataclass
class Settings:
    chapter: str = ""  # its number, 0 to 12
    answer: tuple = ()  # your predictions, joined by commas: numbers, or the letters of choices
    check: str = ""  # a file of yours, with the functions that you have written or changed
    language: Literal["auto", "en", "zh"] = "auto"  # of the pages; auto: of the machine, by LANG
    links: bool = False  # for authors: bring the line numbers in docs/learn up to date
    digests: bool = False  # for authors: this Chinese page renders the English one of today
    ablations: bool = False  # for authors: measure every why anew, and write it into docs/learn


def main(argv: list[str]) -> None:
    argv = [re.sub(r"^--lang\b", "--language", word) for word in argv]
    language = settings.peek("language", argv, "") or "auto"
    if language == "auto":
        machine = filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG")))
        language = "zh" if next(machine, "").startswith("zh") else "en"
    try:
        s = settings.load(Settings, argv, "Learn how a GPT works.", "chapter")
        act(replace(s, language=language))
    except ValueError as e:
        raise ValueError(lessons.said(str(e), language)) from e


def act(s: Settings) -> None:
    if s.links:
        return update_pages(lessons.linked)
    if s.digests:
        return write_digests(s)
    if s.ablations:
        from lessons import ablations

        measured = ablations.measure(ablations.ABLATIONS, tell=print)
        return update_pages(lambda text: ablations.written(text, measured))
    if not s.chapter:
        return contents(s.language)
    last = len(lessons.CHAPTERS) - 1
    known = s.chapter.isdecimal() and int(s.chapter) <= last
    settings.require(known, s, "chapter", f"a number from 0 to {last}")
    number = int(s.chapter)
    if s.check:
        return check(loaded(number), number, Path(s.check), s.language)
    answers = lessons.typed(",".join(s.answer)).split(",") if s.answer else []
    teach(number, s.language, answers)


def loaded(number: int):
    """The code of a chapter. It loads torch, which takes seconds: so not before it is needed."""
    import torch

    torch.set_num_threads(1)  # the work is small; and the last digits are the same for everyone
    return lessons.chapter(number)


def contents(language: str) -> None:
    pages = [lessons.page(number, language) for number in range(len(lessons.CHAPTERS))]
    titles = [path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in pages]
    for number, (title, path) in enumerate(zip(titles, pages, strict=True)):
        gap = " " * (max(map(columns, titles)) - columns(title))
        flag = "" if language == "en" else f" --language={language}"
        page = path.relative_to(lessons.ROOT)
        print(f"python learn.py {f'{number}{flag}':<{3 + len(flag)}} {title}{gap} {page}")


def columns(text: str) -> int:
    """How wide a terminal shows it: a Chinese character takes two."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def plain(text: str) -> str:
    """Markdown without what a terminal cannot show: bold, italics, where links lead. Code stays."""
    code, link = r"```.*?```|`[^`]*`", r"!?\[([^]]*)\]\([^)]*\)"
    bold, italic = r"\*\*(.+?)\*\*", r"(?<![a-z0-9*])\*(\S(?:.*?\S)?)\*(?![a-z0-9*])"

    def shown(found: re.Match) -> str:
        inner = found[1] or found[2] or found[3]
        return plain(inner) if inner else found[0]

    return re.sub(f"{code}|{link}|{bold}|{italic}", shown, text, flags=re.DOTALL)


def teach(number: int, language: str, answers: list[str]) -> None:
    """Asks each question of a page, runs the code that it is about, and says what came out."""
    path = lessons.page(number, language)
    asked = lessons.questions(path)
    if len(answers) > len(asked):
        raise ValueError(f"{len(answers)} answers, but {path.name} has {len(asked)} questions")
    print(f"{path.relative_to(lessons.ROOT)}\n")
    if not answers and not sys.stdin.isatty():
        how = lessons.said("what is piped is not read: predict by --answer=0.3,64,a", language)
        print(f"{how}\n")
    score = []
    for i, question in enumerate(asked):
        print(f"{question.number}  {plain(question.title)}\n\n{plain(question.body)}\n")
        word = answers[i] if i < len(answers) else ask()
        with redirect_stdout(io.StringIO()) as shown:
            value = loaded(number).QUESTIONS[i]()
        for line in shown.getvalue().splitlines():
            print(lessons.said(line, language))
        while word:
            try:
                score.append(lessons.predicted(word, value, question))
                break
            except ValueError as e:
                if i < len(answers):
                    raise
                print(lessons.said(str(e), language))
                word = ask()
        sign = (RIGHT if score[-1] else WRONG) if word else IS
        said = lessons.as_printed(value, question.answer)
        if sign == WRONG:
            said = lessons.said(f"you said {word}; it is {said}", language)
        print(f"\n{sign} {said}\n\n{plain(question.reveal)}\n")
    if score:
        print(f"{RIGHT} {sum(score)} / {len(score)}")


def ask() -> str:
    """What the reader types; nothing, where nobody can."""
    if not sys.stdin.isatty():
        return ""
    try:
        return input(PREDICT).strip()
    except EOFError:
        print()
        return ""


def check(lesson, number: int, path: Path, language: str) -> None:
    """Tells which checks a file passes: those of its exercises, and behind the name of the book's
    file those that hold for the book, whoever wrote it. Raises ValueError unless it passes all."""
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}")
    exercises = [f.__name__ for of_book, f in lessons.labelled(lesson) if not of_book]
    books = {f.__name__ for of_book, f in lessons.labelled(lesson) if of_book}
    wrong = 0
    for name, problem in lessons.check(lesson, path):
        exercises = [other for other in exercises if other != name]
        name = f"{lesson.BOOK}.py: {name}" if name in books else name
        problem = lessons.said(problem, language)
        print(f"{WRONG} {name}: {problem}" if problem else f"{RIGHT} {name}")
        wrong += bool(problem)
    for name in exercises:
        print(f"- {name}: {lessons.said(f'not in {path.name}', language)}")
    if wrong:
        raise ValueError(f"{path} is not right yet in chapter {number}: {wrong} of its checks fail")


def update_pages(change) -> None:
    for path in sorted(lessons.PAGES.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        if (after := change(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {path.relative_to(lessons.ROOT)}")


def write_digests(s: Settings) -> None:
    """Says of a Chinese page (9, README) that it renders the English one of today, and names the
    sections that it said so of before and that have changed since. Of all of them nobody can say
    so at once. Raises ValueError for a page that differs otherwise, in its sections, code or
    numbers: what is not rendered is not said to be."""
    pages: dict[str, list[tuple[Path, Path]]] = {}  # there are two of the name README
    for english, chinese in languages.pairs():
        if chinese.exists():
            pages.setdefault(english.stem.removeprefix("0"), []).append((english, chinese))
    there = ", ".join(sorted(pages))
    s.chapter = s.chapter.removeprefix("0") or s.chapter
    settings.require(s.chapter in pages, s, "chapter", f"with --digests one of {there}")
    differ = []
    for english, chinese in pages[s.chapter]:
        text, before = english.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8")
        try:
            after = languages.stamped(text, before)
            found = languages.differences(text, after)
        except ValueError as e:
            found = [str(e)]
        if found:
            differ.append(f"{chinese.name} ({found[0]})")
            continue
        if after == before:
            continue
        chinese.write_text(after, encoding="utf-8")
        print(f"wrote {chinese.relative_to(lessons.ROOT)}")
        for section, old in zip(*map(languages.sections, (text, before)), strict=True):
            if languages.digest(section) not in languages.DIGEST.findall(old):
                print(f"    {languages.title(section)}")
    if differ:
        raise ValueError(f"not rendered as yet, so left as it was: {'; '.join(differ)}")


if __name__ == "__main__":
    settings.run(main)
