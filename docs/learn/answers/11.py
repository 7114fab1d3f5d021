import torch


def fast_norm(x, eps):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)


def window_numbers(step, rows, rank, world):
    share = rows // world
    first = (step - 1) * rows + rank * share
    return list(range(first, first + share))
