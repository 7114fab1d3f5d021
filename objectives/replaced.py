"""Replaced tokens: which words are not the author's? (ELECTRA: arXiv:2003.10555)

    x          the  cat  sat  on   the  mat
    masked     the  ?    sat  on   ?    mat         a small generator G guesses what is hidden,
    seen       the  dog  sat  on   the  mat         and what it draws stands there
    replaced   no   yes  no   no   no   no          the trunk tells which tokens were replaced

    loss = - mean of ln G(target | masked)  -  50 x mean of ln p(replaced or not | seen)

Every token is an exercise here, and not one in seven. G learns masked tokens and nothing else: it
is not paid for deceiving, and no gradient comes through what it draws. What it draws right counts
as not replaced. G has fewer blocks than the trunk, which reads by its embedding.

About one token in ten is replaced, so accuracy says nothing. Told are the area under the ROC curve
(auc), and which shares of all tokens were `replaced`, are `flagged`, and are both, `found`:
precision is found / flagged, recall found / replaced. What an untrained G draws is easy to tell:
only beside its accuracy does the area say anything.

    python -m objectives.replaced out/replaced --text="def add(a, b): return a + c"
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset import IGNORE
from engine import settings
from engine.settings import Fraction
from model import GPT
from objectives import masked
from pick import pick

WEIGHT = 50.0  # of the paper: the loss of a question with two answers is small beside that of V


@dataclass
class Settings(masked.Settings):
    generator_depth: Fraction = 0.5  # of the trunk's blocks, one at least


class Objective(masked.Objective):
    terms = {"masked": 1.0, "told_apart": WEIGHT}
    terms |= dict.fromkeys(("accuracy", "auc", "replaced", "flagged", "found"), 0.0)
    instead = 'python -m objectives.replaced RUN --text="..."'

    def heads(self, gpt):
        c = gpt.config
        generator = GPT(replace(c, n_layer=max(1, round(self.own.generator_depth * c.n_layer))))
        del generator.wte, generator.head  # it has those of the trunk
        generator.init_weights(self.s.seed)
        if self.s.init_from:  # it begins with what the trunk has learned before
            generator.load_state_dict(gpt.state_dict(), strict=False)
        detect = nn.Linear(c.n_embd, 1)  # begins at zero: all is as likely as not
        nn.init.zeros_(detect.weight)
        nn.init.zeros_(detect.bias)
        return super().heads(gpt) | {"generator": generator, "detect": detect}

    def prepare(self, batch, learner):
        """As masked.py has it; then the tokens, which of them count, and numbers to draw by."""
        (shown, targets, _, *rest), (asked, _) = super().prepare(batch, learner)
        inputs = shown, targets, targets != IGNORE, *rest  # all that is asked for is hidden
        special = np.isin(batch.tokens, [*self.tokenizer.special.values()])
        counted = masked.there(batch) & ~special  # markers are never replaced: that is no question
        T = batch.tokens.shape[1]
        uniform = [np.random.default_rng((*key, 1)).random(T, np.float32) for key in batch.keys]
        windows, n = int((inputs[1] != IGNORE).any(axis=1).sum()), int(counted.sum())
        counts = [asked, n, asked, windows, n, n, n]
        return (*inputs, batch.tokens, counted, np.stack(uniform)), counts

    def loss(self, gpt, heads, shown, targets, hidden, positions, mask, tokens, counted, uniform):
        # 1. the generator: masked tokens, by blocks of its own
        at, vector = targets != IGNORE, heads["mask"][0]
        trunk = heads["generator"].trunk
        x = masked.states(gpt, vector, shown, hidden, positions, mask, trunk)
        logits = gpt.logits(x[at])  # (N, V)
        nats = F.cross_entropy(logits, targets[at], reduction="sum")
        right = (logits.argmax(dim=-1) == targets[at]).sum()

        # 2. what it draws. Logits that are not finite make a loss that is not, which the loop tells
        seen = tokens.clone()
        seen[at] = pick(logits.detach().nan_to_num(), uniform[at].cpu())

        # 3. the trunk: a score for each token, above 0 where it says "replaced"
        score = scores(gpt, heads, seen, positions, mask)
        replaced, flagged = (seen != tokens) & counted, (score > 0) & counted
        both = score[counted], replaced[counted].float()
        apart = F.binary_cross_entropy_with_logits(*both, reduction="sum")
        auc = score.new_zeros(()) if gpt.training else areas(score, replaced, counted)[at.any(1)]
        shares = [z.sum() for z in (replaced, flagged, replaced & flagged)]
        return [nats, apart, right, auc.sum(), *shares]


def scores(gpt, heads, seen, positions, mask):
    """ln p(replaced) / p(not replaced) of each token (B, T).

    The embedding is what G makes of it: two losses that pull at one table spoil it for both
    (arXiv:2111.09543, section 3.2), and a token's vector should not tell that it is often drawn.
    """
    T = seen.size(1)
    everything = torch.ones(1, 1, T, T, dtype=torch.bool, device=seen.device)
    embedded = gpt.wte(seen).detach()
    x = gpt.trunk(seen, everything if mask is None else mask, positions, embedded=embedded)
    return heads["detect"](x)[..., 0].float()


def areas(score, replaced, counted):
    """The area under the ROC curve of each window (B): how often a token that was replaced has a
    higher score than one of the same window that was not. A tie is half a win, and so is a window
    where all or nothing was replaced. A mean over windows does not depend on what is in a pass."""
    pairs = replaced[:, :, None] & (counted & ~replaced)[:, None, :]  # (B, T, T)
    gap = score[:, :, None] - score[:, None, :]
    wins = (((gap > 0).float() + 0.5 * (gap == 0)) * pairs).sum(dim=(1, 2))
    n = pairs.sum(dim=(1, 2))
    return torch.where(n > 0, wins / n.clamp(min=1), 0.5)


# --- the command


@dataclass
class Command:
    run: str = "out/replaced"  # folder of a run, or one checkpoint of it
    text: str = ""  # is each of its tokens what its author wrote?
    above: Fraction = 0.5  # mark the tokens that are replaced with a probability above this


def main(argv: list[str]) -> None:
    s = settings.load(Command, argv, "Find the words that do not belong.", "run")
    settings.require(s.text, s, "text", "a text to look at")
    from engine.learner import opened

    learner, tokenizer = opened(s.run, "replaced")
    ids, room = tokenizer.encode(s.text), learner.gpt.config.block_size
    if len(ids) > room:
        raise ValueError(f"text has {len(ids)} tokens, more than block_size={room}: shorten it")
    with torch.no_grad():
        p = scores(learner.gpt, learner.heads, torch.tensor([ids]), None, None)[0].sigmoid()
    marked = [(tokenizer.decode([i]), q) for i, q in zip(ids, p.tolist(), strict=True)]
    print("".join(f"[{text} {q:.0%}]" if q > s.above else text for text, q in marked))


if __name__ == "__main__":
    settings.run(main)
