"""What every command shares: its options, and how it says what it has to say."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from pydantic import BaseModel

from shoal.node.api.client import Client
from shoal.node.profile import ProfilePaths, check_profile, default_home
from shoal.protocol.errors import UsageError
from shoal.protocol.profiles import profile_folder

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED: Final = 130
"""The exit code after Ctrl-C, as shells have it."""

WIDTH_ELSEWHERE: Final = 160
"""Characters per line in files and pipes."""

Profile = Annotated[str, typer.Option("--profile", envvar="SHOAL_PROFILE", help="Which node of this user.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SwarmArgument = Annotated[str, typer.Argument(metavar="SWARM", help="Its name, or the beginning of it.")]
EnvSet = Annotated[
    list[str] | None,
    typer.Option("--env-set", metavar="KEY=VALUE", help="What the environment is made with; repeat for more."),
]
OptionalSwarm = Annotated[
    str | None, typer.Argument(metavar="[SWARM]", help="Its name, or the beginning of it; may be left out if only one.")
]


def profile_paths(profile: str) -> ProfilePaths:
    """Where a profile keeps what, without making anything."""
    return ProfilePaths(profile_folder(default_home(), check_profile(profile)))


def connect(profile: str) -> Client:
    """A client of the node that runs under a profile.

    Raises:
        NoDaemonError: if there is none.
    """
    return Client(profile_paths(profile), profile)


def print_json(value: BaseModel | Sequence[BaseModel | dict[str, Any]] | dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    if isinstance(value, BaseModel):
        plain: Any = value.model_dump(mode="json")
    elif isinstance(value, dict):
        plain = value
    else:
        plain = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    sys.stdout.write(json.dumps(plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """Where text for people goes."""
    from rich.console import Console

    out = Console(stderr=stderr, highlight=False)
    if not out.is_terminal:
        out.width = WIDTH_ELSEWHERE
    return out


def key_values(option: str, settings: Sequence[str], example: str) -> dict[str, Any]:
    """Read ``key=value`` settings; a value is JSON where it looks like it (a number, true, a list), else text.

    Of one key the last counts.

    Args:
        option: that they were given by.
        settings: what was given.
        example: of one.

    Raises:
        UsageError: if one has no key or no value.
    """
    read: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals and text):
            raise UsageError(f"{option} {setting[:80]!r} should be key=value, for example {example}")
        try:
            read[key] = json.loads(text)
        except ValueError:
            read[key] = text
    return read


def hyperparameters(settings: Sequence[str]) -> dict[str, Any]:
    """What ``--set`` says.

    Raises:
        UsageError: if one has no key or no value.
    """
    return key_values("--set", settings, "learning_rate=0.001")


def env_arguments(settings: Sequence[str]) -> dict[str, Any]:
    """What ``--env-set`` says.

    Raises:
        UsageError: if one has no key or no value.
    """
    return key_values("--env-set", settings, "gravity=-9.8")
