"""Toy: how large is the embedding of what is read?"""

from dataclasses import dataclass

from engine.settings import NotNegative
from objectives import Base


@dataclass
class Settings:
    wanted: NotNegative = 2.0  # mean square of the hidden states


class Objective(Base):
    terms = {"loss": 1.0, "size": 0.0}
    kinds = ("text",)

    def prepare(self, batch, keys, learner):
        return (batch.tokens,), [batch.tokens.size] * 2

    def loss(self, gpt, heads, tokens):
        x = gpt.wte(tokens).square().mean(dim=-1)
        return [(x - self.own.wanted).square().sum(), x.sum()]
