import torch


def rotate(x, rope):
    cos, sin = rope
    D = x.size(-1)
    y = torch.empty_like(x)
    for i in range(D // 2):
        a, b = x[..., i], x[..., i + D // 2]
        c, s = cos[..., i, None], sin[..., i, None]
        y[..., i] = a * c - b * s
        y[..., i + D // 2] = b * c + a * s
    return y


def to_neighbours(w, D):
    heads = w.view(-1, 2, D // 2, w.size(1))  # of each head the first half, then the second
    return heads.transpose(1, 2).reshape(w.shape)
