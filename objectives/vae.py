"""A text variational autoencoder: can a sentence pass through a small code that can be drawn?

    x ── encoder ──▶ q(z|x) = N(mean, variance) ── z = mean + sigma eps ──▶ decoder ──▶ p(x|z)

    -ELBO = - ln p(x|z)  +  KL(q(z|x) || N(0, I))  >=  - ln p(x)           (arXiv:1312.6114)
            reconstruction   1/2 sum over d of mean^2 + variance - 1 - ln variance

The code is 32 numbers. KL bounds what it tells of its sentence, in nats. Since codes are held near
N(0, I), a code drawn from there is that of a new sentence, and between two codes lie sentences
between theirs. But a decoder that predicts well without z saves the KL, and ignores it: the
collapse (arXiv:1511.06349). Against it: z enters at each token and at the first position
(arXiv:2004.04092); the KL counts beta, which rises from 0 to 1 again and again (arXiv:1903.10145);
below `free_bits` a number costs what it costs at free_bits, here in each sentence, however a batch
is cut (arXiv:1606.04934 has their mean); and some tokens are hidden from the decoder. val_loss is
-ELBO without all that. Texts need a sentence a line: prepare.py --lines=true, config/vae.py.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import IGNORE
from engine import settings
from engine.settings import BelowOne, Count, NotNegative, Positive
from model import GPT
from objectives import Base


@dataclass
class Settings:
    latent: Count = 32  # numbers in the code z; 0 is none: a language model, to compare with
    encoder_layers: Positive = 2  # blocks of the encoder
    free_bits: NotNegative = 0.15  # nats up to which each number of the code costs the same
    cycles: Count = 4  # how often beta rises from 0 to 1; 0: it is 1 from the beginning
    word_dropout: BelowOne = 0.1  # this share of the tokens is hidden from the decoder


class Objective(Base):
    terms = {"loss": 1.0, "reconstruction": 0.0, "kl": 0.0}
    masks = ("causal",)
    kinds = ("text",)
    lines = True
    generates = False
    unit = "nats a sentence"
    instead = "python -m objectives.vae RUN --from_prior=10"

    def require(self, data):
        super().require(data)
        T = self.s.model.block_size
        lengths = np.concatenate([part.places[:, 1] for part in data.split("train").parts])
        if np.median(lengths) > T:
            raise ValueError(
                f"most documents of {data.folder} exceed block_size={T} tokens, and"
                " objective='vae' learns from sentences: `prepare.py FILE --lines=true` makes a"
                " document of each line"
            )

    def heads(self, gpt):
        """The encoder is a stack of its own: one that sees a sentence whole and one that must not
        look ahead have little to share but the embeddings, which are the trunk's."""
        c, Z = gpt.config, self.own.latent
        if not Z:
            return {}
        encoder = GPT(replace(c, vocab_size=1, tied=True, n_layer=self.own.encoder_layers))
        encoder.init_weights(self.s.seed)
        posterior = nn.Linear(c.n_embd, 2 * Z)  # to mean and ln variance
        nn.init.zeros_(posterior.weight)  # N(0, I) for every sentence: the KL begins at 0
        nn.init.zeros_(posterior.bias)
        code = nn.Linear(Z, 2 * c.n_embd, bias=False)  # to what the first and what every token gets
        code.weight.data.normal_(0, Z**-0.5, generator=torch.Generator().manual_seed(self.s.seed))
        return {"encoder": encoder, "posterior": posterior, "code": code}

    def beta(self, step: int) -> float:
        """How much the KL counts at this step, counted from 0: the first half of a cycle rises."""
        if not self.own.cycles:
            return 1.0
        return min(1.0, 2 * (step * self.own.cycles / self.s.steps % 1))

    def prepare(self, batch, learner):
        """Tokens, targets, noise (B, Z), hidden (B, T) bool, beta (B)."""
        (B, T), rows = batch.tokens.shape, self.s.batch_tokens // self.s.model.block_size
        noise, hidden = np.zeros((B, self.own.latent), np.float32), np.zeros((B, T), bool)
        beta = np.zeros(B, np.float32)
        for i, key in enumerate(batch.keys):
            rng = np.random.default_rng(key)
            noise[i] = rng.standard_normal(self.own.latent)
            hidden[i] = rng.random(T) < self.own.word_dropout
            beta[i] = self.beta(key[1] // rows)  # in training keys count sentences, B a step
        hidden[:, 0] = False  # the first is no word, it is where z begins
        sentences = int((batch.targets != IGNORE).any(axis=1).sum())
        return (batch.tokens, batch.targets, noise, hidden, beta), [sentences] * 3

    def shown(self, inputs, i):
        return self.tokenizer.decode(inputs[0][i][inputs[1][i] != IGNORE].tolist())

    def loss(self, gpt, heads, tokens, targets, noise, hidden, beta):
        z, kl = None, noise.new_zeros(len(noise), 0)
        if self.own.latent:
            mean, logvar = posterior(gpt, heads, tokens, targets)
            z = mean + (logvar / 2).exp() * noise
            there = (targets != IGNORE).any(dim=1, keepdim=True)
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar) * there  # (B, Z)
        nats = surprise(gpt, heads, tokens, targets, z, hidden if gpt.training else None).sum()
        if not gpt.training:
            return [nats + kl.sum(), nats, kl.sum()]
        cost = kl.clamp(min=self.own.free_bits).sum(dim=1)  # (B)
        return [nats + (beta * cost).sum(), nats, kl.sum()]


def posterior(gpt: GPT, heads, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """q(z|x): mean and ln variance of the code of each sentence, (B, Z) both."""
    there = targets != IGNORE  # (B, T): a token has a next one, what fills up has none
    mask = there[:, None, None] | torch.eye(tokens.size(1), dtype=torch.bool, device=tokens.device)
    encoder = heads["encoder"]
    # the one vector that is its own stands for the sentence, as BERT's [CLS]
    first = encoder.wte(torch.zeros_like(tokens[:, :1]))
    x = encoder.trunk(tokens, mask, embedded=torch.cat((first, gpt.wte(tokens[:, 1:])), dim=1))
    x = (x * there[..., None]).sum(dim=1) / there.sum(dim=1, keepdim=True).clamp(min=1)  # (B, C)
    mean, logvar = heads["posterior"](x).float().chunk(2, dim=-1)
    return mean, logvar


def read(gpt: GPT, heads, tokens: Tensor, z: Tensor | None, begins=True, hidden=None) -> Tensor:
    """What the decoder reads (B, T, C): tokens and code. `begins` with the first, or goes on."""
    x = gpt.wte(tokens)
    if hidden is not None:
        x = x.masked_fill(hidden[..., None], 0)
    if z is None:
        return x
    memory, every = heads["code"](z)[:, None].chunk(2, dim=-1)  # (B, 1, C) both
    x = x + every
    return torch.cat((x[:, :1] + memory, x[:, 1:]), dim=1) if begins else x


def surprise(gpt: GPT, heads, tokens, targets, z: Tensor | None, hidden=None) -> Tensor:
    """-ln p(x|z) of each sentence, in nats: (B)."""
    x = gpt.trunk(tokens, embedded=read(gpt, heads, tokens, z, hidden=hidden))
    at = targets != IGNORE
    nats = x.new_zeros(at.shape, dtype=torch.float32)
    nats[at] = F.cross_entropy(gpt.logits(x[at]), targets[at], reduction="none")
    return nats.sum(dim=1)


if __name__ == "__main__":
    import latent  # the command

    settings.run(latent.main)
