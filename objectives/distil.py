"""Distillation: what does a larger model expect here? (Hinton et al., arXiv:1503.02531)

    loss = share CE(next token) + (1 - share) T^2 KL(teacher_T || student_T)
    KL(q || p) = sum over the vocabulary of q ln(q / p)          q_T = softmax(logits / T)

The data say which token came next, and nothing of those that might have come. A teacher tells how
likely it finds each of all tokens, so one position teaches as much as many texts that go on
differently. A temperature T above 1 raises what is unlikely, which tells most of how the teacher
has understood the rest; the gradient of the KL then shrinks with 1/T^2, which T^2 makes up for.
The teacher is frozen. It has to read the same tokens, and to see as much of them as the student.

    python train.py config/small.py --objective=distil --teacher=out/large --n_embd=64

val_loss is this loss. val_cross_entropy and val_bpb are those of the text alone, as next_token has
them. A teacher's answers can be data as well (arXiv:1606.07947): `evaluate.py --label`.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dataset import IGNORE
from engine import checkpoint, settings
from engine.settings import AboveZero, Fraction
from objectives import Base, next_token, require_writer


@dataclass
class Settings:
    teacher: str = ""  # run or checkpoint that the student imitates
    temperature: AboveZero = 1.0  # of both, where they are compared: above 1 softens them
    data_share: Fraction = 0.5  # of the loss that is the data's own next token


class Objective(Base):
    bits = True  # of the first term
    shown = next_token.Objective.shown

    def __init__(self, s, tokenizer):
        super().__init__(s, tokenizer)
        share = self.own.data_share
        self.terms = dict(cross_entropy=share, kl=1 - share)
        settings.require(bool(self.own.teacher), self.own, "teacher", "a run to learn from")
        gpt, self.theirs, state = checkpoint.load_weights(checkpoint.find(self.own.teacher))
        require_writer(state, self.own.teacher)
        least = f"at most {gpt.config.block_size}, the context of {self.own.teacher}"
        settings.require(s.model.block_size <= gpt.config.block_size, s.model, "block_size", least)
        sees = f"{gpt.config.mask}, as that of {self.own.teacher}"
        settings.require(s.model.mask == gpt.config.mask, s.model, "mask", sees)
        self.teacher = gpt.eval().requires_grad_(False)

    def require(self, data):
        super().require(data)
        if self.theirs.digest() != data.tokenizer.digest():
            raise ValueError(
                f"teacher={self.own.teacher!r} reads {self.theirs.name} ({self.theirs.vocab_size}"
                f" tokens), and {data.folder} is written in {data.tokenizer.name}"
                f" ({data.tokenizer.vocab_size} tokens): prepare it with"
                f" --tokenizer={self.own.teacher}"
            )

    def facts(self):
        digest = hashlib.sha256()
        for name, weights in sorted(self.teacher.state_dict().items()):
            digest.update(name.encode())
            digest.update(weights.cpu().contiguous().view(torch.uint8).numpy())
        return dict(teacher=digest.hexdigest())

    def loss(self, gpt, heads, tokens, targets, positions, mask):
        teacher = self.teacher.to(tokens.device)
        at = targets != IGNORE
        logits = gpt.logits(gpt.trunk(tokens, mask, positions)[at])  # (N, V): of what counts
        with torch.no_grad():
            wanted = teacher.logits(teacher.trunk(tokens, mask, positions)[at])
        T = self.own.temperature
        nats = F.cross_entropy(logits, targets[at], reduction="sum")
        return [nats, T**2 * kl(wanted / T, logits / T)]


def kl(wanted, logits):
    """KL(q || p) of the distributions that logits (N, V) stand for, summed over N; q is wanted."""
    ln_q, ln_p = wanted.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return F.kl_div(ln_p, ln_q, reduction="sum", log_target=True)
