"""One answer as others may see it: text that is certain, and the log-probabilities of its tokens.

    token ──▶ TextStream ──▶ Gate ──▶ text
              whole UTF-8,   no listed
              stop strings   word

What may still become part of a stop string, or of a listed word, is held back, and so is what would
tell it: the log-probability of a token is handed out when its last character is.
"""

from dataclasses import dataclass, field

from engine.wordfilter import Gate
from generate import TextStream

TAIL = 200  # characters in front of an alternative that may make a listed word of it


@dataclass
class Piece:
    """What a step has added to choice `index`.

    `scores` has (id, ln p, alternatives) of each token whose text is certain, where `alternatives`
    are the likeliest (id, ln p); of the prompt's tokens, if these were asked for, it is
    `of_prompt`. `finish` comes with the last: stop, length or content_filter.
    """

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[tuple] = field(default_factory=list)
    of_prompt: bool = False
    finish: str = ""


class Transcript:
    """`finish` is why an answer ended by itself: stop, content_filter, or "" if it goes on."""

    def __init__(self, tokenizer, stop=(), gate: Gate | None = None):
        self.tokenizer, self.gate = tokenizer, gate or Gate(None)
        self.stream = TextStream(tokenizer, stop)
        self.passed = self.told = 0  # characters that the stream has let through; that tokens have
        self.text = ""  # the last of them
        self.held: list[tuple[int, int, tuple]] = []  # scores of tokens, and their characters
        self.finish = ""

    def feed(self, token: int, score: tuple | None = None) -> tuple[str, list[tuple]]:
        """The text, and the scores, that `token` makes certain."""
        stream = self.stream
        before = self.text + stream.held
        text = self.through(stream.feed(token))
        if stream.done:
            self.finish = "stop"
        elif score:  # the last token has none: it is an end, or completes a stop string
            unfinished = bool(stream.decoder.getstate()[0])  # inside a character
            begin, self.told = self.told, self.passed + len(stream.held) + unfinished
            if self.gate.words:
                i, ln_p, others = score
                score = i, ln_p, allowed(others, self.gate.words, self.tokenizer, before)
            self.held.append((begin, self.told, score))
        return text, self.certain()

    def end(self) -> tuple[str, list[tuple]]:
        """What is still held back, when no more tokens come."""
        text = self.through(self.stream.end()) + self.gate.end()
        return text, self.certain()

    def through(self, text: str) -> str:
        self.passed += len(text)
        self.text = (self.text + text)[-TAIL:]
        return self.gate.feed(text)

    def certain(self) -> list[tuple]:
        if self.gate.hit and self.gate.action == "stop":
            self.finish = "content_filter"
        gone = self.gate.released
        ready = [held for held in self.held if held[1] <= gone]
        self.held = [held for held in self.held if held[1] > gone]
        return [score for begin, end, score in ready if self.gate.shows(begin, end)]


def allowed(alternatives: list[tuple], words, tokenizer, before: str) -> list[tuple]:
    """Those (id, ln p) that would not make a listed word, alone or behind `before`."""
    before, kept = before[-TAIL:], []
    for token, ln_p in alternatives:
        text = before + tokenizer.decode([token])
        if not any(end > len(before) for _, end, _ in words.find(text)):
            kept.append((token, ln_p))
    return kept
