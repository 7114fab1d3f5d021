"""What `python learn.py` is made of: chapters that ask, compute with the real code, and compare.

A chapter is a page of docs/learn and a file here. The page has all the words, the file none:

    ### 4.1 How far does the third token look?      docs/learn/04.md, or 04.zh.md: the question
    ...
    <details><summary>4.1</summary>
    **0.71** ...                                    the answer, and why
    </details>

    def third_token(): ...; return 0.7109           lessons/attention.py: QUESTIONS, in their order

So another language is another page, and no code; what the code itself has to say (a mistake, what
a check has found, what a question prints) it says in English, of which messages.zh.md has the
Chinese. Answers are numbers or letters. Exercises have no answer on the page: `CHECKS` of the file
look at what the reader has written, and docs/learn/answers has what passes.
"""

import ast
import importlib
import inspect
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "learn"
CHAPTERS = ("shapes", "tokens", "windows", "blocks", "attention", "positions", "scores")
CHAPTERS += ("descent", "writing", "own_text", "other_tasks", "machine_room", "mistakes")

QUESTION = re.compile(
    r"^### (\d+\.\d+) (.+?)\n(.+?)^<details><summary>.*?</summary>\n(.+?)^</details>", re.M | re.S
)
SOURCE = re.compile(r"\[`([\w/]+\.py): ([\w.]+)`\]\(([^)]*)\)")
ROW = re.compile(r"^\| (.+?) \| (.+) \|$", re.M)
NEAR = 0.1  # a number within a tenth of the true one is a good prediction
COUNTED = 100  # people count so far; a whole number up to this is right or wrong
SCALES = {"k": 1e3, "m": 1e6, "万": 1e4, "亿": 1e8, "%": 1}


class Question(NamedTuple):
    """What a page asks: the number, title and body; what it reveals, and the answer in that."""

    number: str
    title: str
    body: str
    reveal: str

    @property
    def answer(self) -> str:
        """As the page has it: the first thing that is in bold."""
        return re.search(r"\*\*(.+?)\*\*", self.reveal)[1]

    @property
    def choices(self) -> list[str]:
        """Their letters; none where the answer is a number, or any letter."""
        return re.findall(r"[(（]([a-z])[)）]", self.body)


def page(number: int, language: str = "en") -> Path:
    """The page of a chapter in a language, or in English where that is not written yet."""
    wanted = PAGES / f"{number:02}.{language}.md"
    return wanted if wanted.exists() else PAGES / f"{number:02}.md"


def questions(path: Path) -> list[Question]:
    text = re.sub(r"^<!--.*-->\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    return [Question(*map(str.strip, q)) for q in QUESTION.findall(text)]


def chapter(number: int) -> ModuleType:
    return importlib.import_module(f"lessons.{CHAPTERS[number]}")


def as_printed(value, like: str) -> str:
    """`value` with as many decimals as the page has, so that the two can be compared as text."""
    if isinstance(value, str):
        return value
    return f"{value:,.{len(like.partition('.')[2])}f}"


def typed(text: str) -> str:
    """As a plain keyboard types it: Chinese ones have wide letters and signs of their own."""
    return unicodedata.normalize("NFKC", text).replace("、", ",")


def predicted(word: str, value, question: Question) -> bool:
    """Whether what the reader has predicted counts as right: (A), 50% and 131万, too. Raises
    ValueError for what is no number, or none of the choices."""
    plain = typed(word).strip().lstrip("(").rstrip(").。 ").lower()
    if isinstance(value, str):
        if plain not in (question.choices or [plain]):
            choices = ", ".join(question.choices)
            raise ValueError(f"the prediction {word!r:.60} should be one of {choices}")
        return plain == value
    scale = SCALES.get(plain[-1:])
    try:
        number = float((plain[:-1] if scale else plain).replace(",", "")) * (scale or 1)
    except ValueError:
        raise ValueError(f"the prediction {word!r:.60} should be a number") from None
    if isinstance(value, int) and value <= COUNTED:
        return number == value
    unit = 10.0 ** -len(question.answer.partition(".")[2])  # the last digit that is printed
    near = max(NEAR * abs(value), unit / 2)
    if plain.endswith("%") and abs(value) < 1:  # a share; above, the question asks for percent
        number /= 100
    return abs(number - value) <= near


def said(message: str, language: str) -> str:
    """A message in a language of the pages: by that row of docs/learn/messages.zh.md, say, whose
    English it is, with something for each {}. As it is, where there is none."""
    path = PAGES / f"messages.{language}.md"
    rows = ROW.findall(path.read_text(encoding="utf-8")) if path.exists() else []
    for english, other in rows:
        pattern = re.escape(english).replace(r"\{\}", "(.+)")
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return other.format(*found.groups())
    return message


# --- the reader's own file


@contextmanager
def replaced(name: str, path: Path) -> Iterator[dict]:
    """Within, the module `name` of the book is as the reader's file has it: a changed copy, or only
    the functions and classes that differ. Gives the names that the file defines.

    The file runs inside the module, on top of what is there: so everything that the module does
    from then on uses what is new. Raises ValueError if it cannot run.
    """
    module = importlib.import_module(name)
    before = dict(vars(module))
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, str(path))
        kinds = (ast.FunctionDef, ast.ClassDef)
        defined = {node.name for node in tree.body if isinstance(node, kinds)}
        try:
            exec(compile(text, str(path), "exec"), vars(module))
        except (Exception, SystemExit) as e:  # whatever it is, it is a mistake in the file
            raise ValueError(f"{path} does not run: {type(e).__name__}: {e}") from e
        yield {key: vars(module)[key] for key in defined}
    except (SyntaxError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no Python: {e}") from e
    finally:
        vars(module).clear()
        vars(module).update(before)


def check(lesson: ModuleType, path: Path) -> Iterator[tuple[str, str]]:
    """Runs the checks of a chapter on the reader's file: (name of the check, what is wrong or "").

    A check that takes an argument is that of an exercise: it runs if the file defines what the
    check is named after, and is handed that. The others hold for the book, whoever wrote it.
    """
    with replaced(lesson.BOOK, path) as defined:
        for of_book, function in [*labelled(lesson)]:
            if not of_book and function.__name__ not in defined:
                continue
            try:
                function() if of_book else function(defined[function.__name__])
                yield function.__name__, ""
            except (Exception, SystemExit) as e:  # the reader's code may fail in any way
                yield function.__name__, str(e) if type(e) is Wrong else f"{type(e).__name__}: {e}"


def labelled(lesson: ModuleType) -> Iterator[tuple[bool, Callable]]:
    for function in lesson.CHECKS:
        yield not inspect.signature(function).parameters, function


class Wrong(AssertionError):
    """What a check has found, in words that help."""


def require(kept, words: str) -> None:
    if not kept:
        raise Wrong(words)


# --- links to the lines of the code


def lines(file: str, symbol: str) -> tuple[int, int]:
    """First and last line of a function, class, method or constant. Raises ValueError."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for name in symbol.split("."):
        found = [node for node in body if name in names_of(node)]
        if not found:
            raise ValueError(f"{file} has no {symbol}: a page of docs/learn names it")
        body = getattr(found[0], "body", [])
    return found[0].lineno, found[0].end_lineno


def names_of(node: ast.AST) -> list[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]


def linked(text: str) -> str:
    """A page with the line numbers that its links to the code should have today."""

    def link(found: re.Match) -> str:
        file, symbol, _ = found.groups()
        first, last = lines(file, symbol)
        return f"[`{file}: {symbol}`](../../{file}#L{first}-L{last})"

    return SOURCE.sub(link, text)
