"""What OpenAI's clients expect: the pieces of answers, in the shapes of its protocol."""

import codecs
import math
from collections.abc import Iterable
from dataclasses import replace

from engine.protocol import Ask
from engine.transcript import Piece
from tokenizer import Tokenizer

LEAST = -9999.0  # stands for ln 0, which JSON has not


class Answers:
    """Pieces of all choices to the bodies that clients expect."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer):
        self.ask, self.tokenizer = ask, tokenizer
        count = len(ask.prompts) * ask.n
        # of each choice all pieces as one, with places in the text: an echo, then the answer
        self.choices = [Piece(i, self.echo(i)) for i in range(count)]
        self.tokens = 0
        self.begun: set[int] = set()

    def add(self, piece: Piece) -> None:
        self.tokens += piece.count
        self.choices[piece.index].add(replace(piece, places=self.placed(piece)))

    def echo(self, i: int) -> str:
        return self.ask.before[i // self.ask.n] if self.ask.echo else ""

    def usage(self) -> dict:
        asked = sum(map(len, self.ask.prompts))
        total = asked + self.tokens
        return dict(prompt_tokens=asked, completion_tokens=self.tokens, total_tokens=total)

    def head(self, part: str = "") -> dict:
        ask = self.ask
        number = ("chatcmpl-" if ask.chat else "cmpl-") + ask.id
        kind = f"chat.completion{part}" if ask.chat else "text_completion"
        return dict(id=number, object=kind, created=ask.created, model=ask.model)

    def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        choices = []
        for i, said in enumerate(self.choices):
            choice = dict(index=i, finish_reason=said.finish or None)
            choice["logprobs"] = self.logprobs(said.scores, said.places)
            if self.ask.chat:
                choice["message"] = dict(role="assistant", content=said.text, refusal=None)
            else:
                choice["text"] = said.text
            choices.append(choice | self.ids(i, said, True))
        return self.head() | dict(choices=choices, usage=self.usage())

    def ids(self, i: int, piece: Piece, first: bool) -> dict:
        """The ids of a piece, and with the first the prompt's, for who wants them."""
        found = dict(token_ids=piece.ids) if self.ask.ids else {}
        prompt = self.ask.ids and first and not self.ask.chat
        return found | (dict(prompt_token_ids=self.ask.prompts[i // self.ask.n]) if prompt else {})

    def chunks(self, piece: Piece) -> Iterable[dict]:
        """What a piece adds to a stream; in front of a choice's first, its role or echo."""
        i, chat = piece.index, self.ask.chat
        first = i not in self.begun
        self.begun.add(i)
        self.tokens += piece.count
        if first and chat:
            yield self.chunk(i, dict(delta=dict(role="assistant", content="")))
        said = (self.echo(i) if first else "") + piece.text
        if said or piece.scores or piece.finish or (self.ask.ids and piece.ids):
            delta = dict(content=said) if said or not piece.finish else {}
            shown = dict(delta=delta) if chat else dict(text=said)
            shown["logprobs"] = self.logprobs(piece.scores, self.placed(piece))
            shown |= self.ids(i, piece, first)
            if piece.finish and chat and said:  # the last delta is empty
                yield self.chunk(i, shown)
                shown = dict(delta={}, logprobs=None)
            yield self.chunk(i, shown, piece.finish or None)

    def chunk(self, i: int, shown: dict, finish: str | None = None) -> dict:
        choice = dict(index=i, logprobs=None, finish_reason=finish) | shown
        usage = {"usage": None} if self.ask.usage else {}
        return self.head(".chunk") | dict(choices=[choice]) | usage

    def last(self) -> dict:
        """The chunk behind all others, if the client wants to know what was used."""
        return self.head(".chunk") | dict(choices=[], usage=self.usage())

    def placed(self, piece: Piece) -> list[int]:
        """Where the tokens that a piece tells stand in the text: an echo, then the answer."""
        if piece.places or not piece.scores:
            return [len(self.echo(piece.index)) + place for place in piece.places]
        reader, found, place = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        special = {*self.tokenizer.special.values()}
        for token, *_ in piece.scores:  # of the prompt
            found.append(place)
            raw = b"" if token in special else self.tokenizer.decode_bytes([token])
            place += len(reader.decode(raw))
        return found

    def logprobs(self, scores: list[tuple], places: list[int]) -> dict | None:
        if self.ask.top_logprobs is None:
            return None
        if self.ask.chat:
            return dict(content=[self.item(*score) for score in scores], refusal=None)
        words = [self.word(token) for token, _, _ in scores]
        found = [None if p is None else finite(p) for _, p, _ in scores]
        top = [
            None if p is None else {self.word(other): finite(q) for other, q in best}
            for _, p, best in scores
        ]
        return dict(tokens=words, token_logprobs=found, top_logprobs=top, text_offset=places)

    def item(self, token: int, ln_p: float, best: list[tuple]) -> dict:
        return self.entry(token, ln_p) | dict(top_logprobs=[self.entry(*pair) for pair in best])

    def entry(self, token: int, ln_p: float) -> dict:
        raw = [*self.tokenizer.decode_bytes([token])]
        return dict(token=self.word(token), logprob=finite(ln_p), bytes=raw)

    def word(self, token: int) -> str:
        raw = self.tokenizer.decode_bytes([token])
        try:
            return raw.decode()
        except UnicodeDecodeError:  # a piece of a character, written as OpenAI writes it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(ln_p: float) -> float:
    return ln_p if math.isfinite(ln_p) else LEAST
