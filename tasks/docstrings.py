"""Summaries that people wrote: the source of a function, and the first sentence of its docstring.

    def splitdrive(p):                          Split a pathname into drive/UNC sharepoint and
        p = os.fspath(p)                        relative path specifiers.
        ...

From Python's own library, which is on every machine; files are split as in data/python.
"""

import ast
import random
import re
from collections.abc import Iterator
from textwrap import dedent

from tasks import TEST, VAL, library, row

LONGEST_SOURCE = 800  # characters, cut at a line end: how a function begins tells most
LONGEST_SUMMARY = 200
SENTENCE = re.compile(r"(?:e\.g\.|i\.e\.|[^.]|\.(?=\S))+[.]?")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """A row for each function that has a docstring, in an order that the seed decides."""
    found = []
    for path, text in library.files(split, val, test):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):  # the library has such files, as examples
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, FUNCTION) or node.body[0].lineno == node.lineno:
                continue
            summary = first_sentence(ast.get_docstring(node) or "")
            if len(summary.split()) > 1 and len(summary) <= LONGEST_SUMMARY:
                source = without_docstring(node, lines)
                found.append(row("docstrings", source, summary, group=str(path)))
    random.Random(f"{split} {seed}").shuffle(found)
    yield from found


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = SENTENCE.match(paragraph)
    return sentence[0].strip() if sentence else ""


def without_docstring(node: ast.FunctionDef, lines: list[str]) -> str:
    first, last = node.body[0].lineno, node.body[0].end_lineno  # of the docstring, from 1
    source = [*lines[node.lineno - 1 : first - 1], *lines[last : node.end_lineno]]
    source = dedent("\n".join(line for line in source if line.strip()))
    if len(source) <= LONGEST_SOURCE:
        return source
    return source[: source.rfind("\n", 0, LONGEST_SOURCE)]


def name_as_words(source: str) -> str:
    """get_word and getWord become "get word": what a summary has to beat."""
    name = re.search(r"def (\w+)", source)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name[1]) if name else []
    return " ".join(words).lower()


FLOORS = {"name as words": name_as_words}  # what evaluate.py puts beside a model, too


def right(prompt: str, answer: str, reference: str = "") -> bool:
    """Whether it is what the author wrote, word for word: rare, so ROUGE is the measure here."""
    return bool(reference) and answer.split() == reference.split()
