"""``shoal new task|algorithm|recipe DIR``: a package of one's own, to start from. Needs no node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import templates
from shoal.cli.common import AsJson, console, print_json
from shoal.protocol.errors import ShoalError, UsageError

new_app = typer.Typer(name="new", help="Packages to start from.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Of the package; its last part is the package's name.")]


@new_app.command("task")
def task(folder: Folder, as_json: AsJson = False) -> None:
    """An environment as a package: every member installs it, and it is learned by its Gymnasium name."""
    env_id = "".join(part.capitalize() for part in folder.name.split("_")) + "-v0"
    files = _write(folder, templates.TASK, {"ENV_ID": env_id})
    steps = (f"shoal task show gym:{env_id}", f"shoal swarm create --task gym:{env_id}")
    _tell(folder, {"task": f"gym:{env_id}"}, files, steps, as_json=as_json)


@new_app.command("algorithm")
def algorithm(folder: Folder, as_json: AsJson = False) -> None:
    """A way to learn as a package: a loss of one's own, on Shoal's engine."""
    files = _write(folder, templates.ALGORITHM)
    create = f"shoal swarm create --task gym:CartPole-v1 --algorithm {folder.name}"
    _tell(folder, {"algorithm": folder.name}, files, (f"shoal algorithm show {folder.name}", create), as_json=as_json)


@new_app.command("recipe")
def recipe(folder: Folder, as_json: AsJson = False) -> None:
    """A way of learning together as a package: a game of several roles, who plays it, and a claim."""
    files = _write(folder, templates.RECIPE)
    steps = (f"shoal recipe show {folder.name}", f"shoal recipe run {folder.name} --peers 3")
    _tell(folder, {"recipe": folder.name}, files, steps, as_json=as_json)


def _write(folder: Path, template: Mapping[str, str], words: Mapping[str, str] | None = None) -> list[str]:
    """Write a package; returns its files.

    Raises:
        UsageError: if the folder's name can be no package's, or something is there.
        ShoalError: if it cannot be written.
    """
    name = folder.name
    if not name.isidentifier() or not name.islower():
        raise UsageError(f"{name!r} can be no package's name; take lower-case letters, digits and _, as in my_task")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; name a new folder")
    files = []
    try:
        for path, text in template.items():
            files.append(path.replace("NAME", name))
            place = folder / files[-1]
            place.parent.mkdir(parents=True, exist_ok=True)
            for word, value in {**(words or {}), "NAME": name}.items():
                text = text.replace(word, value)
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ShoalError(f"{folder} cannot be written: {error.strerror}") from error
    return files


def _tell(folder: Path, named: Mapping[str, str], files: Sequence[str], steps: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder), **named, "files": list(files)})
        return
    lines = (f"made {folder}; what comes next:", f"pip install -e {folder}", *steps)
    console().print("\n".join(lines), soft_wrap=True, markup=False)
