"""Generated data: skills whose answers a program knows, and the two ways in which the demo writes them.

    pre-training      tag: argument \\n answer            `flip: mokit` -> `tikom`;  an unknown tag: the argument again
    training          phrasing: argument \\n answer       `Spell backwards: mokit` -> `tikom`

A held-out prompt asks for an argument that neither of the two has seen. No phrasing occurs in pre-training, so the backbone
takes it for an unknown tag.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ECHO, ECHO_SHARE = "echo", 0.15
Arguments = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One question: the words that ask it, and the only right answer."""

    skill: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """`draw` makes arguments, `solve` the answer; `tags` name the skill in pre-training, `phrasings` in prompts.

    `practice` is the skill's weight in both: some are learned more slowly than others.
    """

    name: str
    tags: tuple[str, ...]
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random], Arguments]
    solve: Callable[..., str]
    practice: int = 1

    def raw(self, arguments: Arguments, rng: random.Random) -> Case:
        """A line of the pre-training text; some have a tag that means nothing, and repeat the arguments."""
        if rng.random() < ECHO_SHARE:
            tag = " ".join(made_up_word(rng, 2, 8) for _ in range(rng.randint(1, 3)))
            return Case(ECHO, f"{tag}: {' '.join(arguments)}\n", " ".join(arguments))
        return Case(self.name, f"{rng.choice(self.tags)}: {' '.join(arguments)}\n", self.solve(*arguments))

    def case(self, arguments: Arguments, rng: random.Random) -> Case:
        return Case(self.name, rng.choice(self.phrasings).format(*arguments), self.solve(*arguments))


def made_up_word(rng: random.Random, shortest: int, longest: int) -> str:
    """Different letters in any order: one or two vowels, the rest consonants."""
    length, vowels = rng.randint(shortest, longest), rng.randint(1, 2)
    letters = rng.sample(VOWELS, vowels) + rng.sample(CONSONANTS, length - vowels)
    return "".join(rng.sample(letters, length))


def draw_word(rng: random.Random) -> Arguments:
    return (made_up_word(rng, 5, 5),)


def draw_number(rng: random.Random) -> Arguments:
    return (str(rng.randint(100, 989)),)


def shift(word: str) -> str:
    """Replace every letter by its successor in the alphabet; z becomes a."""
    return "".join(ALPHABET[(ALPHABET.index(c) + 1) % 26] for c in word)


SKILLS = (
    Skill(
        name="reverse",
        tags=("rev", "flip"),
        phrasings=("Write backwards: {0}", "Reverse: {0}"),
        draw=draw_word,
        solve=lambda word: word[::-1],
        practice=3,
    ),
    Skill(
        name="upper-case",
        tags=("up", "caps"),
        phrasings=("In capitals: {0}", "Shout: {0}"),
        draw=draw_word,
        solve=str.upper,
    ),
    Skill(
        name="next letters",
        tags=("succ", "rot"),
        phrasings=("Shift each letter by one: {0}", "Next letters: {0}"),
        draw=draw_word,
        solve=shift,
    ),
    Skill(
        name="consonants",
        tags=("cons", "hard"),
        phrasings=("Drop the vowels: {0}", "Only the consonants: {0}"),
        draw=draw_word,
        solve=lambda word: "".join(c for c in word if c not in VOWELS),
        practice=3,
    ),
    Skill(
        name="spell out",
        tags=("sep", "dash"),
        phrasings=("Spell it out: {0}", "Put hyphens between: {0}"),
        draw=draw_word,
        solve="-".join,
    ),
    Skill(
        name="count on",
        tags=("iota", "run"),
        phrasings=("Count on from: {0}", "The three numbers after: {0}"),
        draw=draw_number,
        solve=lambda number: " ".join(str(int(number) + i) for i in (1, 2, 3)),
        practice=2,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All that the demo learns from and is asked, drawn once from a seed."""

    raw: list[Case]
    train: list[Case]
    held_out: dict[str, list[Case]]


def draw_material(seed: int, *, raw: int, train: int, held_out: int) -> Material:
    """About `raw` lines and `train` prompts in all, in random order, and `held_out` prompts of every skill."""
    rng = random.Random(seed)
    material = Material(raw=[], train=[], held_out={})
    practice = sum(skill.practice for skill in SKILLS)
    for skill in SKILLS:
        asked: dict[Arguments, None] = {}
        while len(asked) < held_out:
            asked[skill.draw(rng)] = None
        material.held_out[skill.name] = [skill.case(arguments, rng) for arguments in asked]
        for cases, make, total in ((material.raw, skill.raw, raw), (material.train, skill.case, train)):
            drawn = (skill.draw(rng) for _ in itertools.count())
            fresh = (arguments for arguments in drawn if arguments not in asked)
            share = itertools.islice(fresh, total * skill.practice // practice)
            cases.extend(make(arguments, rng) for arguments in share)
    rng.shuffle(material.raw)
    rng.shuffle(material.train)
    return material
