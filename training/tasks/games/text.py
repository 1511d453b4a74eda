"""One question, one answer, and what scores it: ``TextTask(sort_digits)``.

A *puzzle* makes an entry from a seed, the same everywhere, and scores an answer to it; that is the form of
reasoning-gym, whose tasks fit as they are (`shoal.training.tasks.games.reasoning`). The exact ones here are made for
models of characters: short, on a small alphabet, with one right answer. A scenario may bring a question of its own as
``params["prompt"]``, where the puzzle can read it: one that another member wrote, say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from shoal.training.tasks.play import Ask, BadScenarioError, End, Play, Role, Take, Text
from shoal.training.tasks.source import Scenario

Entry: TypeAlias = Mapping[str, Any]
"""``question`` and ``answer``, both text, and what else the scorer needs."""
ASKED: Final = "solver"
MAX_CHARS: Final = 16_384


class Puzzle(Protocol):
    """What can be asked and scored."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def entry(self, seed: int) -> Entry:
        """A question and its answer, which depend on the seed alone."""
        ...

    def score(self, answer: str, entry: Entry) -> float:
        """How good an answer is, 0 to 1."""
        ...


class Exact:
    """A puzzle whose answer follows from the question, so that anybody's question will do."""

    name = ""

    def question(self, rng: np.random.Generator) -> str:
        """One, by chance."""
        raise NotImplementedError

    def solve(self, question: str) -> str | None:
        """The right answer; None: that is no question."""
        raise NotImplementedError

    def entry(self, seed: int) -> Entry:
        """A question and its answer."""
        question = self.question(np.random.default_rng(seed))
        return {"question": question, "answer": self.solve(question)}

    def score(self, answer: str, entry: Entry) -> float:
        """1 for the right answer, 0 for all others."""
        return float(answer == entry["answer"])


@dataclass(frozen=True, slots=True)
class SortDigits(Exact):
    """So many digits, to be sorted."""

    digits: int = 8
    name = "sort digits"

    def question(self, rng: np.random.Generator) -> str:
        """Digits in any order."""
        return "".join(map(str, rng.integers(10, size=self.digits)))

    def solve(self, question: str) -> str | None:
        """The same in order."""
        return "".join(sorted(question)) if re.fullmatch(r"[0-9]{1,64}", question) else None


@dataclass(frozen=True, slots=True)
class Sums(Exact):
    """So many numbers of so many digits, to be added."""

    digits: int = 2
    terms: int = 2
    name = "sums"

    def question(self, rng: np.random.Generator) -> str:
        """``17+4=``."""
        return "+".join(map(str, rng.integers(10**self.digits, size=self.terms))) + "="

    def solve(self, question: str) -> str | None:
        """Their sum."""
        read = re.fullmatch(r"([0-9]{1,9}(?:\+[0-9]{1,9}){1,15})=", question)
        return str(sum(map(int, read[1].split("+")))) if read else None


@dataclass(frozen=True, slots=True)
class Products(Exact):
    """Two numbers of so many digits, to be multiplied."""

    digits: int = 1
    name = "products"

    def question(self, rng: np.random.Generator) -> str:
        """``3*7=``."""
        return "*".join(map(str, rng.integers(10**self.digits, size=2))) + "="

    def solve(self, question: str) -> str | None:
        """Their product."""
        read = re.fullmatch(r"([0-9]{1,9})\*([0-9]{1,9})=", question)
        return str(math.prod(map(int, read.groups()))) if read else None


sort_digits: Final = SortDigits()
sums: Final = Sums()
multi_step_sums: Final = Sums(terms=4)
products: Final = Products()


def sorted_digits(take: Take) -> str:
    """The right answer to `sort_digits`, as one that is taught is shown it."""
    return "".join(sorted(take.sights[-1]))


class TextTask:
    """A puzzle as a game with one role, ``solver``. Its score is the reward, and in the scores as ``right``."""

    def __init__(self, puzzle: Puzzle, *, max_tokens: int | None = None) -> None:
        self.name = f"text:{puzzle.name}"
        self.puzzle = puzzle
        self.roles = {ASKED: Role(Text(MAX_CHARS), Text(MAX_CHARS))}
        self._max_tokens = max_tokens

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """Ask, and score."""
        entry = entry_of(self.puzzle, scenario)
        (answer,) = yield (Ask(ASKED, entry["question"], max_tokens=self._max_tokens),)
        score = self.puzzle.score(str(answer), entry)
        return End({ASKED: score}, scores={"right": score})


def entry_of(puzzle: Puzzle, scenario: Scenario) -> Entry:
    """What a scenario asks: its own prompt, or what its seed gives.

    Raises:
        BadScenarioError: if its prompt is no question of this puzzle.
    """
    prompt = scenario.params.get("prompt")
    if prompt is None:
        return puzzle.entry(scenario.seed)
    answer = puzzle.solve(prompt) if isinstance(puzzle, Exact) and isinstance(prompt, str) else None
    if answer is None:
        raise BadScenarioError(f"{prompt!r:.80} is no question of {puzzle.name}")
    return {"question": prompt, "answer": answer}
