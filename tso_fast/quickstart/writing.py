"""Short lines on a person and a thing under two to four constraints; very many lines are good answers to a prompt.

    Mia and coins: mention tiny; end with at night; at least 9 words.
    -> later Mia found tiny coins by the bridge and Tom laughed softly at night

A careless demonstrator breaks each constraint at a rate that its wording decides: clichés stand where words were asked
for, what was forbidden is written, lines are as long as they come. Models trained on such lines know both behaviours.
The score of a line is the share of the constraints that hold, as the verifier ``ifeval`` tells it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tso_fast.files.labels import Label, make_label
from tso_fast.judges.constraints import holds
from tso_fast.judges.verifier import VERIFIERS
from tso_fast.quickstart.task import NAMES, Task
from tso_fast.types import Candidates, Constraint

THINGS = ("pears", "coins", "books", "cards", "shells", "stamps", "bells", "keys")
VERBS = ("found", "saw", "hid", "drew", "kept", "lost")
DEEDS = ("sang", "laughed", "slept", "waited", "danced", "smiled", "cried", "ran")
ADJECTIVES = ("old", "red", "tiny", "bright", "heavy", "cheap")
PLACES = ("lake", "garden", "tree", "bridge", "hill", "market")
PREPOSITIONS = ("by", "near", "behind", "under")
ADVERBS = ("softly", "loudly", "slowly", "twice", "gladly", "alone")
OPENERS = ("today", "once", "later", "suddenly", "often", "now")
ENDINGS = ("at night", "at dusk", "before noon", "with joy", "in silence", "after school")

CLICHES = {"adjective": "nice", "place": "at home", "adverb": "well", "opener": "so", "ending": "as always"}
"""What the careless write where a word was asked for. Habits, not chance: else the word that was asked for would stay
the likeliest one however seldom it is written."""
CARELESS = (0.25, 0.6)
"""Shares of demonstrations that break a constraint; kind and wording decide which of the two applies."""

Parts = Mapping[str, str | bool]
"""Parts of a line that are told: words by slot, and whether it has commas or quotation marks."""


class Asked(NamedTuple):
    """A constraint that may be asked for: ``Asked(["avoid drew", ...], Constraint(...), {}, {"verb": "drew"})``."""

    wordings: list[str]
    constraint: Constraint
    kept: Parts
    """What a line has that keeps it."""
    broken: Parts
    """What a line has that breaks it."""


class Wanted(NamedTuple):
    """One constraint of a prompt: ``Wanted("forbid", "avoid drew", Constraint(...), {}, {"verb": "drew"}, 0.6)``."""

    kind: str
    wording: str
    constraint: Constraint
    kept: Parts
    broken: Parts
    careless: float
    """How often a careless demonstrator breaks it."""


# ---- lines


def draw(r: random.Random, name: str, thing: str, told: Parts) -> str:
    """A line with the parts that are told; the others are as chance has it, few or many of them."""
    fullness = r.random()

    def part(slot: str, words: Callable[[], str]) -> str:
        if slot in told:
            return str(told[slot])
        return words() if r.random() < fullness else ""

    opener = part("opener", lambda: r.choice(OPENERS))
    adjective = part("adjective", lambda: r.choice(ADJECTIVES))
    place = part("place", lambda: _somewhere(r, r.choice(PLACES)))
    if place in PLACES:
        place = _somewhere(r, place)
    adverb = part("adverb", lambda: r.choice(ADVERBS))
    deed = f"{r.choice(NAMES)} {r.choice(DEEDS)}"
    ending = part("ending", lambda: r.choice(ENDINGS))
    verb = told.get("verb") or r.choice(VERBS)
    comma = "," if told.get("commas", r.random() < 0.5) else ""
    clauses = [
        f"{opener}{comma}" if opener else "",
        name,
        verb,
        adjective,
        f"{thing} {place}".strip() + (comma if adverb else ""),
        f"and {deed} {adverb}" if adverb else "",
        ending,
    ]
    line = " ".join(str(clause) for clause in clauses if clause)
    return f'"{line}"' if told.get("quotes", r.random() < 0.1) else line


def _somewhere(r: random.Random, place: str) -> str:
    return f"{r.choice(PREPOSITIONS)} the {place}"


# ---- constraints


def _mention(r: random.Random, least: int) -> Asked:
    slot, words = r.choice((("adjective", ADJECTIVES), ("place", PLACES), ("adverb", ADVERBS)))
    word = r.choice(words)
    return Asked(
        [f"mention {word}", f"use the word {word}"],
        Constraint(id="keywords:existence", kwargs={"keywords": [word]}),
        {slot: word},
        {slot: CLICHES[slot]},
    )


def _forbid(r: random.Random, least: int) -> Asked:
    verb = r.choice(VERBS)
    return Asked(
        [f"avoid {verb}", f"never write {verb}"],
        Constraint(id="keywords:forbidden_words", kwargs={"forbidden_words": [verb]}),
        {},
        {"verb": verb},
    )


def _begin(r: random.Random, least: int) -> Asked:
    word = r.choice(OPENERS)
    return Asked(
        [f"begin with {word}", f"open with {word}"],
        Constraint(id="combination:repeat_prompt", kwargs={"prompt_to_repeat": word}),
        {"opener": word, "quotes": False},
        {"opener": CLICHES["opener"]},
    )


def _end(r: random.Random, least: int) -> Asked:
    phrase = r.choice(ENDINGS)
    return Asked(
        [f"end with {phrase}", f"close with {phrase}"],
        Constraint(id="startend:end_checker", kwargs={"end_phrase": phrase}),
        {"ending": phrase},
        {"ending": CLICHES["ending"]},
    )


def _long(r: random.Random, least: int) -> Asked:
    words = max(8, least + 2) + r.randrange(2)
    return Asked(
        [f"at least {words} words", f"{words} words or more"],
        Constraint(id="length_constraints:number_words", kwargs={"relation": "at least", "num_words": words}),
        {},
        {},
    )


def _short(r: random.Random, least: int) -> Asked:
    words = least + 2 + r.randrange(2)
    return Asked(
        [f"less than {words} words", f"under {words} words"],
        Constraint(id="length_constraints:number_words", kwargs={"relation": "less than", "num_words": words}),
        {},
        {},
    )


def _no_comma(r: random.Random, least: int) -> Asked:
    return Asked(
        ["no commas", "without commas"],
        Constraint(id="punctuation:no_comma"),
        {"commas": False},
        {"commas": True},
    )


def _quote(r: random.Random, least: int) -> Asked:
    return Asked(
        ["in quotes", "put it in quotes"],
        Constraint(id="startend:quotation"),
        {"quotes": True},
        {"quotes": False},
    )


KINDS: dict[str, Callable[[random.Random, int], Asked]] = {
    "mention": _mention,
    "forbid": _forbid,
    "begin": _begin,
    "end": _end,
    "no_comma": _no_comma,
    "quote": _quote,
    "long": _long,
    "short": _short,
}
"""Constraints by kind. Each takes the least number of words of a line that keeps those before it: lengths come last."""
APART = ({"long", "short"}, {"begin", "quote"})
"""Kinds that do not go together."""
MANNER = frozenset({"no_comma", "quote", "long", "short"})
"""Kinds that say how a line is written."""
WORDING = frozenset(KINDS) - MANNER
"""Kinds that say which words it has."""
WORDS = {"adjective": 1, "opener": 1, "ending": 2, "place": 3, "adverb": 4}
"""Words that a slot adds to the least line, of a name, a verb and a thing; an adverb brings its clause."""


def share(constraints: Sequence[Constraint], text: str) -> float:
    """Share of the constraints that hold, as the verifier ``ifeval`` says."""
    return VERIFIERS["ifeval"].says(constraints, text).score or 0.0


# ---- exercises


@dataclass(frozen=True, kw_only=True)
class Writing:
    """One prompt: a person, a thing, and the constraints on the line."""

    name: str
    thing: str
    wanted: tuple[Wanted, ...]

    @property
    def kind(self) -> str:
        return "+".join(want.kind for want in self.wanted)

    @property
    def prompt(self) -> str:
        return f"{self.name} and {self.thing}: {'; '.join(want.wording for want in self.wanted)}."

    @property
    def known(self) -> dict[str, Any]:
        return {"constraints": [{"id": want.constraint.id, "kwargs": want.constraint.kwargs} for want in self.wanted]}

    def score(self, text: str, twice: Collection[str] = ()) -> float:
        """Share of the constraints that hold, those of the kinds in ``twice`` counted twice."""
        counted = [want.constraint for want in self.wanted for _ in range(2 if want.kind in twice else 1)]
        return share(counted, text)

    def write(self, r: random.Random, is_kept: list[bool]) -> str:
        """A line that keeps just these constraints: lines are drawn until one does."""
        told: dict[str, str | bool] = {}
        for want, kept in zip(self.wanted, is_kept, strict=True):
            told |= want.kept if kept else want.broken
        while True:
            line = draw(r, self.name, self.thing, told)
            if [holds(want.constraint, line) for want in self.wanted] == is_kept:
                return line

    def demonstrate(self, r: random.Random) -> str:
        return self.write(r, [r.random() >= want.careless for want in self.wanted])

    def respond(self, r: random.Random) -> str:
        return self.demonstrate(r)


def make(r: random.Random, number: int) -> Writing:
    wanted: list[Wanted] = []
    least = 3
    for kind in _kinds(r):
        asked = KINDS[kind](r, least)
        least += sum(WORDS.get(slot, 0) for slot in asked.kept)
        which = r.randrange(len(asked.wordings))
        careless = CARELESS[(which + list(KINDS).index(kind)) % len(CARELESS)]
        wanted.append(Wanted(kind, asked.wordings[which], *asked[1:], careless))
    return Writing(name=r.choice(NAMES), thing=r.choice(THINGS), wanted=tuple(wanted))


def _kinds(r: random.Random) -> list[str]:
    """Two to four kinds that go together, in the order of ``KINDS``."""
    count = r.randint(2, 4)
    while True:
        found = set(r.sample(list(KINDS), count))
        if not any(apart <= found for apart in APART):
            return [kind for kind in KINDS if kind in found]


# ---- people

NUM_LABELS = 120
"""Pairs that a person labels in an iteration."""
MISTAKES = 0.1
"""Share of a person's labels that prefer the worse line."""


def people(candidates: Sequence[Candidates], seed: int) -> list[Label]:
    """What a simulated person says of one random pair of each of a few prompts; lines as good as each other tie."""
    r = random.Random(f"people {seed} {candidates[0].prompt.id}")
    labels = []
    for item in r.sample(candidates, min(NUM_LABELS, len(candidates))):
        i, j = sorted(r.sample(range(len(item.responses)), 2))
        first, second = (share(item.prompt.constraints, item.responses[n].text) for n in (i, j))
        is_right = r.random() >= MISTAKES
        probability = 0.5 if first == second else float((first > second) == is_right)
        labels.append(make_label(item, (i, j), "simulated", probability))
    return labels


TASK = Task(
    make=make,
    judges={
        "words": functools.partial(Writing.score, twice=WORDING),
        "manner": functools.partial(Writing.score, twice=MANNER),
    },
)
