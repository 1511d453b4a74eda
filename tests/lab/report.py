"""What came of the pairs: a record of each, the matrix for people, the list for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from .expected import LADDER, expected
from .rules import KINDS, PAIRED

FIRST_BYTE_TARGET_S: Final = 1.0
BEST_PATH_TARGET_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Result:
    """One pair.

    Attributes:
        a: kind of the site that called.
        b: kind of the other.
        path: the last that was seen, empty if there was none.
        first_byte_s: until the first call was answered.
        best_path_s: until the path was as good as expected; None if it never was.
        problem: what went wrong, for people.
        reasons: where a better path than this one was hoped for: what either node knew, and what came of each rung.
    """

    a: str
    b: str
    connected: bool
    path: str = ""
    first_byte_s: float | None = None
    best_path_s: float | None = None
    problem: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether they are connected as well as theory allows."""
        return self.connected and expected(self.a, self.b).is_met_by(self.path)

    @property
    def is_best(self) -> bool:
        """Whether no better path could be hoped for, where several are good enough; a punched one is like a direct."""
        paths = expected(self.a, self.b).paths
        return self.is_good and LADDER.index("punched" if "punched" in paths else paths[0]) >= LADDER.index(self.path)

    def record(self) -> dict[str, object]:
        """What is written for programs."""
        values = asdict(self)
        values["expected_path"] = "|".join(expected(self.a, self.b).paths)
        names = ("a", "b", "connected", "path", "expected_path", "first_byte_s", "best_path_s")
        return {name: values[name] for name in names}


def line(result: Result) -> str:
    """One pair in a line."""
    wanted = expected(result.a, result.b)
    verdict = "ok" if result.is_good else "NOT AS EXPECTED"
    path = result.path or "not connected"
    text = f"{result.a} with {result.b}: {path} (expected {' or '.join(wanted.paths)}), {verdict}"
    if result.first_byte_s is not None:
        text += f"; first byte {result.first_byte_s:.2f} s"
    if result.best_path_s is not None:
        text += f", best path {result.best_path_s:.2f} s"
    return text


def show(results: Sequence[Result], console: Console) -> None:
    """Print the matrix, the medians, and what is not as it should be."""
    by_pair = {pair: result for result in results for pair in ((result.a, result.b), (result.b, result.a))}
    table = Table(title="Paths between two kinds of site, seconds to the best", title_justify="left")
    table.add_column("")
    for number, _ in enumerate(KINDS, 1):
        table.add_column(str(number), justify="center")
    for number, row in enumerate(KINDS, 1):
        cells = [_cell(by_pair.get((row, column))) for column in KINDS[:number]]
        table.add_row(f"{number} {row.replace('_', ' ')}", *cells)
    console.print(table)
    for kind in PAIRED:
        if (kind, kind) in by_pair:
            console.print(f"{kind.replace('_', ' ')}: {_cell(by_pair[kind, kind]).replace(chr(10), ' ')} s")
    for name, values, target_s in (
        ("first byte", [result.first_byte_s for result in results], FIRST_BYTE_TARGET_S),
        ("best path", [result.best_path_s for result in results], BEST_PATH_TARGET_S),
    ):
        known = [value for value in values if value is not None]
        if known:
            median_s = statistics.median(known)
            console.print(f"{name}: median {median_s:.2f} s (target {target_s:.0f} s), worst {max(known):.2f} s")
    connected = sum(result.connected for result in results)
    good = sum(result.is_good for result in results)
    console.print(f"connected {connected} of {len(results)}; as good as theory allows {good} of {len(results)}")
    for result in results:
        if not result.is_good:
            told = "\n".join((line(result), result.problem, *result.reasons))
            console.print(told, style="red", markup=False, highlight=False, soft_wrap=True)


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    path = result.path or "none"
    seconds = "" if result.best_path_s is None else f"{result.best_path_s:.1f}"
    return f"[{'green' if result.is_good else 'bold red'}]{path}[/]\n{seconds}"


def write(results: Sequence[Result], path: Path) -> None:
    """Write the list for programs."""
    write_json([result.record() for result in results], path)


def write_json(found: object, path: Path) -> None:
    """Write what was found, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
