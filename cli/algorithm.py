"""``shoal algorithm``: what is installed to learn by, and what can be set of it. Needs no node."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shoal.cli import render
from shoal.cli.common import AsJson, console, print_json

algorithm_app = typer.Typer(name="algorithm", help="Ways to learn.", no_args_is_help=True)


@algorithm_app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """The algorithms that are installed."""
    from shoal.training.algorithms.catalogue import entries  # loads NumPy, which no other command needs

    found = entries()
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        console().print(render.algorithms(found))


@algorithm_app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `shoal algorithm ls` has it.")],
    as_json: AsJson = False,
) -> None:
    """One of them: its paper, how it differs from that, and every setting with its default."""
    from shoal.training.algorithms.catalogue import details  # loads NumPy, which no other command needs

    found = details(name)
    if as_json:
        print_json(found.to_plain())
    else:
        console().print(render.algorithm(found))
