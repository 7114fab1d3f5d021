from itertools import pairwise


def merge(ids, pair, new):
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def encode(word, tokens):
    ids = {token: i for i, token in enumerate(tokens)}
    parts = [bytes([b]) for b in word.encode()]
    while True:
        joined = [(ids.get(a + b, len(ids)), i) for i, (a, b) in enumerate(pairwise(parts))]
        best, i = min(joined, default=(len(ids), 0))
        if best == len(ids):
            return [ids[part] for part in parts]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
