def hours(tokens, epochs, tokens_per_second):
    return tokens * epochs / tokens_per_second / 3600


def training_bytes(V, C, L):
    tables, matrices = 2 * V * C, 12 * L * C * C
    return 4 * ((1 + 1 + 2) * tables + (1 + 1 + 1) * matrices)
