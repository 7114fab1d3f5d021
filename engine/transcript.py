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

    `count` tokens were generated; `ids` are those whose text is certain, `scores` their (id, ln p,
    alternatives), where alternatives are the likeliest (id, ln p). `finish` comes with the last:
    stop, length or content_filter.
    """

    index: int
    text: str = ""
    count: int = 0
    ids: list[int] = field(default_factory=list)
    scores: list[tuple] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # characters in front of each, in the answer
    finish: str = ""

    def add(self, more: "Piece") -> None:
        self.text += more.text
        self.count += more.count
        self.ids += more.ids
        self.scores += more.scores
        self.places += more.places
        self.finish = more.finish


class Transcript:
    """`before` is what the reader has in front of the answer: listed words may begin there.

    `with_end`: the end-of-text that ends an answer has a score, too. `finish` is why an answer
    ended by itself: stop, content_filter, or "" if it goes on.
    """

    def __init__(self, tokenizer, stop=(), words=None, action="stop", before="", with_end=False):
        self.tokenizer, self.with_end = tokenizer, with_end
        self.gate = Gate(words, action, before)
        self.stream = TextStream(tokenizer, stop)
        self.passed = 0  # characters that the stream has let through
        self.text = before[-TAIL:]  # the last of them, and of `before`
        self.held: list[tuple] = []  # tokens, where they begin and end, and their scores
        self.finish = ""

    def feed(self, token: int, score: tuple | None = None) -> Piece:
        """What `token` makes certain."""
        stream = self.stream
        before, begin = self.text + stream.held, self.passed + len(stream.held)
        text = self.through(stream.feed(token))
        if stream.done:
            self.finish = "stop"
        is_end = token in stream.ends and self.with_end
        if not stream.done or is_end:  # else it completes a stop string
            unfinished = bool(stream.decoder.getstate()[0])  # inside a character
            end = self.passed + len(stream.held) + unfinished
            # bytes before it that turned out to be no text have become characters only now
            begin = max(begin, end - len(self.tokenizer.decode([token])))
            if score and self.gate.words:
                i, ln_p, others = score
                score = i, ln_p, allowed(others, self.gate.words, self.tokenizer, before)
            self.held.append((begin, end, token, score))
        return self.certain(text, 1)

    def end(self) -> Piece:
        """What is still held back, when no more tokens come."""
        return self.certain(self.through(self.stream.end()) + self.gate.end())

    def of_prompt(self, scores: list[tuple]) -> Piece:
        """The scores of a prompt's tokens, less alternatives that would make a listed word."""
        before, found = "", []
        for token, ln_p, others in scores:
            if self.gate.words:
                others = allowed(others, self.gate.words, self.tokenizer, before)
                before = (before + self.tokenizer.decode([token]))[-TAIL:]
            found.append((token, ln_p, others))
        return Piece(0, scores=found)

    def through(self, text: str) -> str:
        self.passed += len(text)
        self.text = (self.text + text)[-TAIL:]
        return self.gate.feed(text)

    def certain(self, text: str, count: int = 0) -> Piece:
        if self.gate.hit and self.gate.action == "stop":
            self.finish = "content_filter"
        gone = self.gate.released
        shown = [held for held in self.held if self.gate.shows(*held[:2])]
        self.held = [held for held in self.held if held[1] > gone]
        scores = [score for *_, score in shown if score]
        places = [begin for begin, *_, score in shown if score]
        ids = [token for _, _, token, _ in shown if token not in self.stream.ends]
        return Piece(0, text, count, ids, scores, places)


def allowed(alternatives: list[tuple], words, tokenizer, before: str) -> list[tuple]:
    """Those (id, ln p) that would not make a listed word, alone or behind `before`."""
    before, kept = before[-TAIL:], []
    for token, ln_p in alternatives:
        text = before + tokenizer.decode([token])
        if not any(end > len(before) for _, end, _ in words.find(text)):
            kept.append((token, ln_p))
    return kept
