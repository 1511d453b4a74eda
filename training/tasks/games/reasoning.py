"""reasoning-gym's tasks (arXiv 2505.24760) as puzzles: ``TextTask(ReasoningGym("leg_counting"))``.

Only what `TABLE` names is made, and not all that reasoning-gym has: an answer may be another member's, and nine of its
scorers give the answer to Python's ``eval`` or to a parser that does (countdown, puzzle24, n_queens, spiral_matrix,
binary_matrix, string_insertion, polynomial_multiplication, and both integrations, in 0.1.25). Whoever answers would run
code here. Left out are also tasks that take seconds, that have no answer of their own, that compute with SymPy, one
that pays for any answer, and one that gives other questions for the same seed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from shoal.protocol.errors import UsageError
from shoal.training.plugins import suggest
from shoal.training.tasks.failures import in_words
from shoal.training.tasks.games.needs import needed
from shoal.training.tasks.games.text import Entry

log = logging.getLogger(__name__)

TABLE: Final = frozenset(
    (
        *("ab", "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation"),
        *("bitwise_arithmetic", "caesar_cipher", "chain_sum", "circuit_logic", "color_cube_rotation"),
        *("complex_arithmetic", "count_bits", "count_primes", "course_schedule", "cryptarithm"),
        *("decimal_arithmetic", "decimal_chain_sum", "dice", "emoji_mystery", "family_relationships"),
        *("fraction_simplification", "futoshiki", "gcd", "group_anagrams"),
        *("gsm_symbolic", "isomorphic_strings", "jugs", "kakurasu", "knights_knaves", "largest_island", "lcm"),
        *("leg_counting", "letter_counting", "letter_jumble", "list_functions", "mahjong_puzzle"),
        *("manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "needle_haystack", "number_filtering"),
        *("number_format", "number_sequence", "number_sorting", "palindrome_generation"),
        *("palindrome_partitioning", "path_star", "pool_matrix", "power_function", "products", "quantum_lock"),
        *("ransom_note", "rearc", "rectangle_count", "rotate_matrix", "rotten_oranges", "self_reference"),
        *("sentence_reordering", "shortest_path", "simple_geometry", "sokoban", "spell_backward"),
        *("string_manipulation", "string_splitting", "string_synthesis", "sudoku", "survo", "syllogism"),
        *("time_intervals", "tower_of_hanoi", "tsumego", "word_ladder", "word_sequence_reversal"),
        *("word_sorting", "zebra_puzzles"),
    )
)


class ReasoningGym:
    """One of reasoning-gym's tasks, by its name.

    Raises:
        UsageError: if the table does not name it, it does not take these settings, or reasoning-gym is not installed.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        if name not in TABLE:
            raise UsageError(f"no task of reasoning-gym is called {name!r:.80} here; {suggest(name, TABLE)}")
        self.name = f"reasoning-gym:{name}"
        package = needed("reasoning_gym", self.name)
        self._make: Callable[[int], Any] = lambda seed: package.create_dataset(name, seed=seed, size=1, **settings)
        try:
            self._scorer = self._make(0)
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"{self.name} does not take {settings}: {' '.join(str(error).split())[:200]}") from error

    def entry(self, seed: int) -> Entry:
        """The first of a data set of this seed."""
        found: Entry = self._make(seed)[0]
        return found

    def score(self, answer: str, entry: Entry) -> float:
        """By the task's own scorer; one that breaks down over an answer has not found it right."""
        try:
            return float(self._scorer.score_answer(answer, entry))
        except Exception as error:  # other people's code, over anybody's words
            log.info("the scorer of %s broke down: %s", self.name, in_words(error))
            return 0.0
