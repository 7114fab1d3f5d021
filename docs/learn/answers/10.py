from itertools import pairwise


def answers(ids, assistant, end):
    targets, inside = [], False
    for token, following in pairwise(ids):
        inside = token == assistant or (inside and token != end)
        targets.append(following if inside else -100)
    return targets


def advantages(rewards):
    mean = sum(rewards) / len(rewards)
    spread = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / spread if spread else 0.0 for r in rewards]
