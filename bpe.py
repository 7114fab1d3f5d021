"""Byte-pair encoding, learned: which strings of bytes a vocabulary should have as tokens.

The most frequent pair of neighbouring tokens becomes a new token, again and again (Sennrich et al.
2016, arXiv:1508.07909; on bytes as in GPT-2). By hand, for a text with low 5 times, lower twice,
newest 6 times and widest 3 times:

    pairs: es 6 + 3 = 9   st 6 + 3 = 9   we 2 + 6 = 8   lo 5 + 2 = 7   ow 7   ne 6   ew 6   ...
    1. e s -> es     9 times; st has 9 too, but of equals the one with the smaller ids is first
    2. es t -> est   9 times; s t is gone, and newest's w is followed by es now
    3. l o -> lo     7 times
    4. lo w -> low   7 times; so lower is low e r now, and newest n e w est

To encode a text is to merge neighbours again, those first whose token was learned first: whichever
pair spells it, as tiktoken does. (GPT-2's list of merges names pairs, and for rare words differs.)
"""

import heapq
from collections import Counter, defaultdict
from itertools import pairwise

from tokenizer import END_OF_TEXT, SPLIT, Tokenizer, encoding_of

LONGEST = 256  # characters of a word that is taken whole: longer ones are no words


def slow_bpe(words: Counter, vocab_size: int) -> list[bytes]:
    """The tokens by id, without end-of-text, learned from a count of words: the paper's loop."""
    tokens = [bytes([i]) for i in range(256)]
    texts = {word: list(word.encode()) for word in words}  # each word as ids
    while len(tokens) < vocab_size - 1:
        pairs: Counter = Counter()
        for word, ids in texts.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pairs[pair] < 2:
            break  # what occurs once tells nothing about other texts
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in tokens:  # two pairs may spell the same bytes: one token serves both
            tokens.append(merged)
        new = tokens.index(merged)
        texts = {word: merge(ids, pair, new) for word, ids in texts.items()}
    return tokens


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`ids` with `new` wherever `pair` stood, from left to right."""
    merged: list[int] = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def bpe_tokenizer(
    words: Counter, vocab_size: int, progress=lambda done: None, pattern: str = SPLIT
) -> Tokenizer:
    """Byte-pair encoding learned from a count of the words that `pattern` cuts text into.

    Learns what slow_bpe learns (a test compares them), but does not count all pairs anew for each
    merge: only words that have the pair change, and which they are is remembered. End-of-text is
    the last id. Text with too few pairs that occur twice gives less than `vocab_size`.
    """
    # cut, since each merge reads a word as a whole; sorted, so that the result depends on the
    # counts alone and never on the order of counting
    counts: Counter = Counter()
    for word, count in words.items():
        for i in range(0, len(word), LONGEST):
            counts[word[i : i + LONGEST]] += count
    texts = [(list(word.encode()), count) for word, count in sorted(counts.items())]
    tokens = [bytes([i]) for i in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}

    # 1. count every pair, and remember which words it occurs in
    pairs: Counter = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, (ids, count) in enumerate(texts):
        for pair in pairwise(ids):
            pairs[pair] += count
            where[pair].add(w)
    # 2. a heap is a list that yields its smallest entry in log(n) steps: here the most frequent
    # pair, of equals the one with the smaller ids. It cannot change an entry inside: when a count
    # falls, the old entry stays and is stale, which shows when it comes to the top
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    while len(tokens) < vocab_size - 1 and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # stale: back with its true count
            if pairs[pair] > 1:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if -count < 2:
            break
        # 3. the pair becomes a token
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in ranks:
            ranks[merged] = len(tokens)
            tokens.append(merged)
            progress(len(tokens))
        new = ranks[merged]
        # 4. merge it in the words that have it; only the pairs around it change
        changed = set()
        for w in where.pop(pair):
            ids, count = texts[w]
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) != pair:
                    i += 1
                    continue
                if i > 0:
                    pairs[ids[i - 1], ids[i]] -= count
                    pairs[ids[i - 1], new] += count
                    where[ids[i - 1], new].add(w)
                    changed.add((ids[i - 1], new))
                if i + 2 < len(ids):
                    pairs[ids[i + 1], ids[i + 2]] -= count
                    pairs[new, ids[i + 2]] += count
                    where[new, ids[i + 2]].add(w)
                    changed.add((new, ids[i + 2]))
                ids[i : i + 2] = [new]
                i += 1
        pairs[pair] = 0
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))

    return Tokenizer("bpe", encoding_of("bpe", pattern, ranks, {END_OF_TEXT: len(ranks)}))
