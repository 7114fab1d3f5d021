"""Short stories of who is where and who holds what, and a question about them.

    Nora went to the harbour. Felix took the lantern. Nora took the rope. Nora walked to the attic.
    Where is the rope?      attic

The kind of tasks 1, 2 and 6 of bAbI (arXiv:1502.05698), with words of its own: one fact, or two
that must be joined (who holds the rope, where she is now), among facts that do not matter, and the
latest counts. Questions: where somebody is, where a thing is, who has it, and whether somebody is
somewhere. Of a story to learn from up to five are asked, since most of the work is to read it.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter

from tasks import TEST, VAL, distinct, row

ROWS = dict(train=40_000, val=1_000, test=1_000)
ASKED = dict(train=5, val=1, test=1)  # questions of a story, at most
PEOPLE = ("Nora", "Felix", "Amina", "Boris")
PLACES = ("harbour", "attic", "bakery", "library", "meadow", "station", "cellar")
THINGS = ("rope", "lantern", "map", "basket")
GO = ("went to", "walked to", "ran to")
TAKE = ("took", "picked up")
DROP = ("put down", "left")
SENTENCE = re.compile(rf"(\w+) ({'|'.join(GO + TAKE + DROP)}) the (\w+)")


class World:
    """Where people and things are and who holds what, as far as the sentences told it."""

    def __init__(self):
        self.place: dict[str, str] = {}  # of people, and of things that lie somewhere
        self.holder: dict[str, str] = {}  # of things

    def tell(self, sentence: str) -> None:
        who, verb, what = SENTENCE.fullmatch(sentence).groups()
        if verb in GO:
            self.place[who] = what
        elif verb in TAKE:
            self.holder[what] = who
        else:
            del self.holder[what]
            self.place[what] = self.place[who]

    def where(self, name: str) -> str | None:
        return self.place.get(self.holder.get(name, name))

    def next_sentence(self, rng: random.Random) -> str:
        """Something that can happen: people go, take what lies where they are, and put it down."""
        who = rng.choice(PEOPLE)
        here = self.place.get(who)
        held = [thing for thing in THINGS if self.holder.get(thing) == who]
        free = [thing for thing in THINGS if thing not in self.holder]
        near = [thing for thing in free if self.place.get(thing, here) == here]
        action = rng.choice(("go", "take", "take", "drop")) if here else "go"
        if action == "take" and near:
            return f"{who} {rng.choice(TAKE)} the {rng.choice(near)}"
        if action == "drop" and held:
            return f"{who} {rng.choice(DROP)} the {rng.choice(held)}"
        return f"{who} {rng.choice(GO)} the {rng.choice([p for p in PLACES if p != here])}"

    def answer(self, question: str) -> str | None:
        """None for what the story does not tell."""
        if asked := re.fullmatch(r"Where is (?:the )?(\w+)\?", question):
            return self.where(asked[1])
        if asked := re.fullmatch(r"Who has the (\w+)\?", question):
            return self.holder.get(asked[1], "nobody") if self.where(asked[1]) else None
        if asked := re.fullmatch(r"Is (\w+) in the (\w+)\?", question):
            here = self.where(asked[1])
            return here and ("yes" if here == asked[2] else "no")
        return None


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """Rows of which hardly two are alike; a story belongs to one split with all its questions."""
    found = distinct(draw, itemgetter(0), split, seed, val, test)  # by the story
    for story, questions in islice(found, ROWS[split]):
        turns = []
        for question in questions[: ASKED[split]]:
            prompt = question if turns else f"{story}\n{question}"
            turns += row("facts", prompt, solve(f"{story}\n{question}"))["messages"]
        yield dict(messages=turns, task="facts", group=story)


def draw(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A story and different questions about it."""
    world, sentences = World(), []
    for _ in range(rng.randint(3, 12)):
        sentences.append(world.next_sentence(rng))
        world.tell(sentences[-1])
    questions = dict.fromkeys(ask(world, rng) for _ in range(ASKED["train"]))
    return " ".join(f"{sentence}." for sentence in sentences), tuple(questions)


def ask(world: World, rng: random.Random) -> str:
    who = rng.choice([person for person in PEOPLE if person in world.place])
    there = world.place[who]
    somewhere = rng.choice((there, rng.choice([place for place in PLACES if place != there])))
    thing = rng.choice([thing for thing in THINGS if world.where(thing)] or [""])
    questions = [f"Where is {who}?", f"Is {who} in the {somewhere}?"]
    if thing:
        questions += [f"Where is the {thing}?", f"Who has the {thing}?"]
    return rng.choice(questions)


def solve(prompt: str) -> str | None:
    """The answer, worked out from the prompt; None if that is no story with a question at its end.
    Between them may stand what was asked and answered before."""
    lines = prompt.strip().split("\n")
    story, question = lines[0], lines[-1]
    world = World()
    try:
        for sentence in story.removesuffix(".").split(". "):
            world.tell(sentence)
    except (AttributeError, KeyError):  # no such sentence; what nobody holds was put down
        return None
    return world.answer(question)


def right(prompt: str, answer: str, reference: str = "") -> bool:
    return answer.strip() == solve(prompt)
