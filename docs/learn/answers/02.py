import numpy as np


def exercises(tokens, starts, T):
    x = np.stack([tokens[start : start + T] for start in starts])
    y = np.stack([tokens[start + 1 : start + T + 1] for start in starts])
    return x, y


def window_of(step, row, rows, per_epoch):
    return divmod(step * rows + row, per_epoch)
