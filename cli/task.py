"""``shoal task``: what is installed to be learned, and what an environment shows, takes and can be told. No node."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shoal.cli import render_tasks
from shoal.cli.common import AsJson, EnvSet, console, env_arguments, print_json

task_app = typer.Typer(name="task", help="What can be learned.", no_args_is_help=True)


@task_app.command("ls")
def ls(
    words: Annotated[
        str, typer.Argument(metavar="[WORDS]", help="Only those whose name or summary has this in it.")
    ] = "",
    package: Annotated[
        str | None, typer.Option(metavar="NAME", help="Those of a package that knows nothing of Shoal, as minigrid.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The tasks that are installed: of environments, the newest version of each."""
    from shoal.training.tasks.catalogue import entries, entries_of  # Gymnasium, which no other command needs

    wanted = words.lower()
    known = entries() if package is None else entries_of(package)
    found = [each for each in known if wanted in each.name.lower() or wanted in each.summary.lower()]
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        console().print(render_tasks.tasks(found))


@task_app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `shoal task ls` has it: gym:CartPole-v1.")],
    env_set: EnvSet = None,
    as_json: AsJson = False,
) -> None:
    """One of them: what it shows, how it is acted in, what is wrapped around it, and what it can be made with."""
    from shoal.training.tasks.catalogue import details  # likewise

    found = details(name, env_arguments(env_set or ()))
    if as_json:
        print_json(found.to_plain())
    else:
        console().print(render_tasks.task(found))
