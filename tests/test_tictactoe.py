"""Tic-tac-toe: what is a move, who has won, and what gives nothing away."""

import random
from types import SimpleNamespace

import pytest

import generate
from tasks import tictactoe


@pytest.mark.parametrize(
    "prompt, moves",
    [
        (":", ""),
        ("5 1 9:", "519"),
        ("5 1 9", None),  # no end
        ("5 1 5:", None),  # taken
        ("1 4 2 5 3:", None),  # X has won
        ("1 2 3 5 4 6 8 7 9:", None),  # nothing is free
        ("0:", None),
    ],
)
def test_the_beginning_of_a_game_is_read_and_anything_else_is_not(prompt, moves):
    assert tictactoe.read(prompt) == moves
    assert tictactoe.right(prompt, "5") == (moves is not None and "5" not in moves)


def test_who_has_won_is_who_moved_last():
    assert tictactoe.won("14253") and not tictactoe.won("1425") and not tictactoe.won("14268")
    for a, b, c in tictactoe.LINES:
        x, y = [square for square in tictactoe.SQUARES if square not in a + b + c][:2]
        assert tictactoe.won(f"{c}{x}{a}{y}{b}") and not tictactoe.won(f"{c}{x}{a}{y}")


@pytest.mark.parametrize(
    "moves, value, sound",
    [
        ("", 0, "123456789"),  # well played, it is a draw, wherever it begins
        ("5", 0, "1379"),  # the corners hold the middle
        ("1", 0, "5"),  # and the middle the corner
        ("12", 1, "457"),
        ("1524", 1, "3"),  # wins at once; whatever else draws
        ("152", 0, "3"),  # has to be taken
        ("159", 0, "2468"),  # a third corner would be lost
        ("15937", -1, "2468"),  # lost whatever is played, so nothing is given away
    ],
)
def test_a_sound_move_gives_nothing_away(moves, value, sound):
    assert tictactoe.value(moves) == value
    prompt = tictactoe.written(moves)
    assert "".join(c for c in "0123456789x" if tictactoe.sound(prompt, c)) == sound
    assert not tictactoe.sound(prompt, "")


@pytest.fixture
def player(monkeypatch):
    """play(choose): the figures of one who moves as `choose` says, given the moves so far."""
    tokenizer = SimpleNamespace(
        encode_row=lambda turns, task, open: turns[0]["content"], decode=lambda ids: ids
    )

    def play(choose):
        def answers(model, tokenizer, prompts, most, **options):
            yield from enumerate(map(choose, map(tictactoe.read, prompts)))

        monkeypatch.setattr(generate, "answers", answers)
        return tictactoe.play(None, tokenizer, tictactoe.Command(games=300))

    return play


def test_one_who_gives_nothing_away_never_loses(player):
    def sound(moves: str) -> str:
        return next(c for c in "123456789" if tictactoe.sound(tictactoe.written(moves), c))

    found = player(sound)
    assert found["lost"] == found["illegal"] == 0 and found["won"] > 200
    assert sum(found.values()) == 300


def test_one_who_moves_at_random_loses_as_often_as_it_wins(player):
    rng = random.Random(0)
    found = player(lambda moves: rng.choice(tictactoe.free(moves)))
    assert found["illegal"] == 0 and abs(found["won"] - found["lost"]) < 50
    assert player(lambda moves: "1")["illegal"] > 200
