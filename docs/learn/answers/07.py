import math


def learning_rate(step, steps, warmup, decay, final, shape):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = min(1, (steps - step) / (decay * steps))
    if shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return final + (1 - final) * left


def adam_step(w, g, m, v, step, lr, beta1, beta2, eps):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    mean, square = m / (1 - beta1**step), v / (1 - beta2**step)
    return w - lr * mean / (square.sqrt() + eps), m, v
