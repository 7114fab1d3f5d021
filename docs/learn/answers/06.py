import math


def cross_entropy(logits, targets):
    logits = logits - logits.amax(dim=-1, keepdim=True)
    right = logits[range(len(targets)), targets]
    return (logits.exp().sum(dim=-1).log() - right).mean()


def bits_per_byte(loss, tokens, bytes):
    return loss * tokens / math.log(2) / bytes
