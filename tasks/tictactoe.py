"""Tic-tac-toe as moves in writing: the game so far asks, and the answer is a move.

    1 2 3      5 1 9:    X took the middle, O the first corner, X the last
    4 5 6      3         a square that is free
    7 8 9

The games are played at random, so what is to be learned from them is what a move is, as from
transcripts of Othello (arXiv:2210.13382): nobody shows a board. What is held back are beginnings.
How to win is another lesson: with `sound` as its reward a model learns it from its own moves.

    python prepare.py tictactoe --tokenizer=bytes
    python train.py config/tictactoe.py
    python train.py config/player.py
    python -m tasks.tictactoe out/player        against one who moves at random
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

from engine import settings
from engine.checkpoint import find, load_weights
from engine.settings import Positive
from tasks import TEST, VAL, distinct, row

ROWS = dict(train=20_000, val=1_000, test=1_000)
SQUARES = "123456789"
LINES = ("123", "456", "789", "147", "258", "369", "159", "357")


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """Rows of which no two are alike; a beginning belongs to one split, however it goes on."""
    for moves in islice(distinct(game, beginning, split, seed, val, test), ROWS[split]):
        yield row("tictactoe", written(moves[:-1]), moves[-1])


def game(rng: random.Random) -> str:
    """The moves of a game that is played at random, up to a move that is drawn, too."""
    moves = ""
    while left := free(moves):
        moves += rng.choice(left)
    return moves[: rng.randint(1, len(moves))]


def beginning(moves: str) -> str:
    return moves[:-1]


def written(moves: str) -> str:
    return f"{' '.join(moves)}:"


def read(prompt: str) -> str | None:
    """The moves of a prompt; None if these are no moves of a game that goes on."""
    moves = prompt.strip().removesuffix(":").replace(" ", "")
    legal = all(square in free(moves[:i]) for i, square in enumerate(moves))
    return moves if legal and free(moves) and written(moves) == prompt.strip() else None


def free(moves: str) -> str:
    """The squares that may be taken: none if the game is over."""
    return "" if won(moves) else "".join(c for c in SQUARES if c not in moves)


def won(moves: str) -> bool:
    """Whether the last move has won: X has the moves 1, 3, 5 ..., O the others."""
    own = moves[::-1][::2]
    return len(own) > 2 and any(a in own and b in own and c in own for a, b, c in LINES)


def value(moves: str) -> int:
    """What the one who is to move can reach if both play their best: 1 a win, 0 a draw, -1 a loss.
    It is the best of what each move leaves to the other, turned over (minimax)."""
    return value_of("".join(sorted(moves[::2])), "".join(sorted(moves[1::2])))


@cache
def value_of(x: str, o: str) -> int:
    mine, yours = (x, o) if len(x) == len(o) else (o, x)
    if any({*line} <= {*yours} for line in LINES):
        return -1
    best = -1 if len(x + o) < len(SQUARES) else 0
    for square in set(SQUARES) - {*x, *o}:
        more = "".join(sorted(mine + square))
        best = max(best, -value_of(*((more, o) if mine is x else (x, more))))
    return best


def right(prompt: str, answer: str, reference: str = "") -> bool:
    """Whether it is a move."""
    moves = read(prompt)
    return moves is not None and len(answer.strip()) == 1 and answer.strip() in free(moves)


def sound(prompt: str, answer: str, reference: str = "") -> bool:
    """Whether it is a move that gives nothing away: what could be reached can be reached still."""
    if not right(prompt, answer):
        return False
    moves = read(prompt)
    return -value(moves + answer.strip()) == value(moves)


# --- the command


@dataclass
class Command:
    run: str = "out/player"  # folder of a run, or one checkpoint of it
    games: Positive = 1000  # half of them begun by the model, half by the other
    temperature: settings.NotNegative = 0.0  # of the model's moves; 0 takes the likeliest
    seed: int = 1  # of the other's moves


def play(model, tokenizer, s: Command) -> dict[str, int]:
    """How many games against random moves the model won, drew, lost, or ended by no move."""
    from generate import answers

    ended = dict(won=0, drawn=0, lost=0, illegal=0)
    draws = [random.Random(f"{s.seed} {i}") for i in range(s.games)]
    going = {i: draw.choice(free("")) if i % 2 else "" for i, draw in enumerate(draws)}
    turn = 0
    while going:
        numbers, turn = [*going], turn + 1
        asked = ([dict(role="user", content=written(going[i]))] for i in numbers)
        prompts = [tokenizer.encode_row(turns, "tictactoe", True) for turns in asked]
        options = dict(temperature=s.temperature, seed=f"{s.seed} {turn}")
        for k, ids in answers(model, tokenizer, prompts, 4, **options):
            i, move = numbers[k], tokenizer.decode(ids).strip()
            moves = going.pop(i)
            if not right(written(moves), move):
                ended["illegal"] += 1
                continue
            moves += move
            if not free(moves):
                ended["won" if won(moves) else "drawn"] += 1
                continue
            moves += draws[i].choice(free(moves))
            if free(moves):
                going[i] = moves
            else:
                ended["lost" if won(moves) else "drawn"] += 1
    return ended


def main(argv: list[str]) -> None:
    s = settings.load(Command, argv, "Play tic-tac-toe against random moves.", "run")
    model, tokenizer, _ = load_weights(find(s.run))
    for name, count in play(model.eval(), tokenizer, s).items():
        print(f"{name:8}{count / s.games:7.1%}")


if __name__ == "__main__":
    settings.run(main)
