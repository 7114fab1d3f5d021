"""Next token: what comes after what has been read? (Shannon 1951; Radford et al. 2018)

    loss = - sum over t of ln p(x[t] | x[0], ..., x[t-1])

The product of these probabilities is the probability of the whole text, so to learn this is to
learn the distribution of text, and to draw one token after another is to draw from it: this trunk
writes. In rows only the answers count. What is below is for few rows, which are learned by heart
before they are understood; all of it is off until it is asked for (robust.py, docs/tasks.md).
"""

from dataclasses import dataclass

from dataset import IGNORE
from engine import settings
from engine.settings import BelowOne, NotNegative
from objectives import Base
from robust import adversarial, augment


@dataclass
class Settings:
    # whoever is never rewarded for being certain learns less by heart (arXiv:1512.00567, section 7)
    label_smoothing: BelowOne = 0.0  # this share of each target goes to all tokens alike
    augment: BelowOne = 0.0  # this share of the tokens of prompts is changed: see robust.py
    adversarial: NotNegative = 0.0  # learn also from embeddings moved by this: see robust.py


class Objective(Base):
    bits = mixes = compiles = True

    @staticmethod
    def check(s):
        both = s.own.augment and s.train_on == "all"
        settings.require(not both, s.own, "augment", "0 with train_on=all: prompts are targets")
        both = s.own.adversarial and s.compile == "true"
        settings.require(not both, s, "compile", "false with --adversarial, which needs gradients")
        both = s.own.adversarial and s.shard
        settings.require(not both, s, "shard", "false with --adversarial, which needs gradients")
        s.compile = "false" if s.own.adversarial else s.compile

    def exercises(self, batch, learner):
        if self.own.augment:
            batch = augment(batch, [*self.tokenizer.special.values()], self.own.augment)
        yield self.prepare(batch, learner)

    def shown(self, inputs, i):
        read, targets = inputs[0][i], inputs[1][i]
        asked = targets[targets != IGNORE]  # each is what follows, so moved by one
        return "\n-> ".join(self.tokenizer.decode(ids.tolist()) for ids in (read, asked))

    def loss(self, gpt, heads, tokens, targets, positions, mask):
        smoothing = self.own.label_smoothing if gpt.training else 0.0
        more = dict(mask=mask, positions=positions, smoothing=smoothing)
        if self.own.adversarial and gpt.training:

            def nats(embedded):
                return gpt(tokens, targets, "sum", embedded=embedded, **more)

            return [adversarial(nats, gpt.wte(tokens), self.own.adversarial)]
        return [gpt(tokens, targets, "sum", **more)]
