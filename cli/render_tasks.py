"""Tasks for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # the command that shows them has loaded Gymnasium; the others have not
    from shoal.training.tasks.catalogue import TaskDetails, TaskEntry


def tasks(found: Sequence[TaskEntry]) -> RenderableType:
    """Tasks, one a line."""
    if not found:
        return "nothing that is installed is called so; `shoal task ls` shows all"
    table = Table.grid(padding=(0, 2))
    for each in found:
        table.add_row(f"[bold]{escape(each.name)}[/]", escape(each.summary), f"[yellow]{escape(each.needs)}[/]")
    return table


def task(found: TaskDetails) -> RenderableType:
    """One task, and what it can be made with."""
    facts = Table.grid(padding=(0, 2))
    for part, name in ((found.observation, "shows"), (found.action, "takes")):
        if "space" in part:
            facts.add_row(name, escape(part["space"]))
    facts.add_row("networks see", escape(found.observation["seen_as"]))
    facts.add_row("policies choose", escape(found.action["acts_by"]))
    if found.max_episode_steps is not None:
        facts.add_row("an episode lasts", f"{found.max_episode_steps} steps at most")
    if found.target_return is not None:
        facts.add_row("solved at", f"{found.target_return:g}")
    if found.wrappers:
        facts.add_row("wrapped in", escape(", ".join(found.wrappers)))
    title = f"[bold]{escape(found.name)}[/], version {found.version}: {escape(found.summary)}"
    parts: list[RenderableType] = [title, "", *([escape(found.about), ""] if found.about else []), facts]
    if found.arguments:
        table = Table("--env-set", "default", box=None, header_style="dim")
        for name, value in found.arguments.items():
            table.add_row(f"[bold]{escape(name)}[/]", escape(json.dumps(value, ensure_ascii=False)))
        parts += ["", table]
        if found.takes_more:
            parts.append("[dim]and others that it does not name[/]")
    return Group(*parts)
