"""A conversation in the terminal: python sample.py out/chat --chat

A model remembers nothing. What it knows of a conversation is what stands before the answer that it
writes, so the whole of it is read again with each question:

    <|user|> 1 + 1 <|end|> <|assistant|> 2 <|end|> <|user|> and 1 more? <|end|> <|assistant|>

When that leaves no room for an answer in its context, the oldest question and its answer are left
out, and it is as if they had never been said.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine import console, opening, settings
from engine.packing import fit

# what can change in the middle of a session
CHANGEABLE = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
CHANGEABLE += ("num_samples", "beam", "stop", "seed", "system", "task")


def turn(role: str, content: str) -> dict:
    return dict(role=role, content=content)


def recalled(turns: list[dict], tokenizer, limit: int, s) -> list[int]:
    """The row that a model of context `limit` goes on from, with room for an answer: a quarter of
    the context, or `s.max_tokens`, if that is less.

    The oldest of `turns` are removed from that list until it fits, and of the last, if it is too
    long by itself, the front. Raises ValueError for a context that has no room for markers.
    """
    before = [turn("system", s.system)] if s.system else []
    room = limit - min(s.max_tokens, limit // 4)
    there = len(turns)
    tokens = tokenizer.encode_row(before + turns, s.task, open=True)
    kept = sum(said["role"] == "system" for said in turns[:1])  # that of a row stays
    while len(tokens) > room and len(turns) > kept + 1:
        del turns[kept : kept + 2]  # a question and its answer
        tokens = tokenizer.encode_row(before + turns, s.task, open=True)
    if len(turns) < there:
        gone = f"the first {there - len(turns)} turns are forgotten"
        print(f"(the context of {limit} tokens is full: {gone})", file=sys.stderr)
    if len(tokens) > room:
        note = f"the prompt makes {len(tokens)} tokens; only the last {room} or so fit the context"
        print(note, file=sys.stderr)
        tokens = fit(np.array(tokens), room, tokenizer.markers).tolist()
    if not tokens:
        raise ValueError(f"a context of {limit} tokens has no room for the markers of a turn")
    return tokens


def converse(
    s, go_on: Callable[[str, object], str], answer: Callable[[list[dict], object], str]
) -> None:
    """Takes one line after another; a line that begins with / changes a setting.

    `go_on(line, s)` prints what follows it as text, `answer(turns, s)` what follows as a turn of a
    model that has learned from rows; both return it. With `s.chat` what was said before counts, up
    to /reset. An answer that was stopped was not said.
    """
    print("Type a prompt, or /help. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    said: list[dict] = []
    for line in console.lines():
        try:
            if line == "/reset":
                said = []
            elif line.startswith("/"):
                s = changed(s, line)
            else:
                opening.require_clean(line, s)
                if not (s.chat or s.task):
                    go_on(line, s)
                    continue
                turns = [*said, turn("user", line)]
                text = answer(turns, s)  # which removes the oldest turns, where room is short
                if s.chat:
                    said = [*turns, turn("assistant", text)]
        except KeyboardInterrupt:
            print()
        except ValueError as e:
            print(e, file=sys.stderr)


def changed(s, line: str):
    """The settings after `/name value`, or after `/name`, which brings the default back."""
    name, _, value = line[1:].partition(" ")
    if name in CHANGEABLE:
        words = [f"--{name}={value}"] if value else []
        given = settings.load(type(s), words, "", "run")
        s = replace(s, **{name: getattr(given, name)})
        try:
            opening.check(s)
        except ValueError as e:
            raise ValueError(f"{e} (here: /name alone brings a default back)") from e
    elif name != "help":
        raise ValueError(f"/{name} cannot be changed here: /help tells what can")
    values = (f"{name}={getattr(s, name)!r}" for name in CHANGEABLE)
    print("settings, as in /temperature 0.5:", *values, file=sys.stderr)
    if s.chat and name == "help":
        print("/reset forgets what was said", file=sys.stderr)
    return s
