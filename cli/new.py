"""``shoal new task DIR``: a package with an environment of one's own, to start from. Needs no node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from shoal.cli.common import AsJson, console, print_json
from shoal.protocol.errors import ShoalError, UsageError

new_app = typer.Typer(name="new", help="Packages to start from.", no_args_is_help=True)


@new_app.callback()
def _new() -> None:
    """Keeps ``task`` a word of its own while it is the only one."""


@new_app.command("task")
def task(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of the package; its last part is the package's name.")],
    as_json: AsJson = False,
) -> None:
    """An environment as a package: every member installs it, and it is learned by its Gymnasium name."""
    name = folder.name
    if not name.isidentifier() or not name.islower():
        raise UsageError(f"{name!r} can be no package's name; take lower-case letters, digits and _, as in my_task")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; name a new folder")
    env_id = "".join(part.capitalize() for part in name.split("_")) + "-v0"
    files = {"pyproject.toml": PYPROJECT, "README.md": README, f"{name}/__init__.py": MODULE}
    try:
        for path, text in files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text.replace("NAME", name).replace("ENV_ID", env_id), encoding="utf-8")
    except OSError as error:
        raise ShoalError(f"{folder} cannot be written: {error.strerror}") from error
    if as_json:
        print_json({"folder": str(folder), "task": f"gym:{env_id}", "files": list(files)})
    else:
        lines = (f"pip install -e {folder}", f"shoal task show gym:{env_id}", f"shoal swarm create --task gym:{env_id}")
        console().print("\n".join((f"made {folder}; what comes next:", *lines)), soft_wrap=True, markup=False)


PYPROJECT: Final = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "NAME"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["gymnasium>=1.0", "numpy>=2.0"]

# By this Shoal finds the environment: its id, and what puts it into Gymnasium's registry.
[project.entry-points."shoal.environments"]
"ENV_ID" = "NAME:register"
"""

README: Final = """# NAME

An environment of your own, learned together by Shoal.

    pip install -e .                      # on every member: code never travels
    shoal task show gym:ENV_ID
    shoal swarm create --task gym:ENV_ID --env-set length=7

Others install the same package and `shoal join TICKET`. Raise the version in the id (`-v1`) whenever the environment
shows, rewards or ends otherwise than before: members must agree.
"""

MODULE: Final = '''"""ENV_ID: walk to the end of a corridor. Replace it by what you want to be learned."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


def register() -> None:
    """Put the environment into Gymnasium's registry."""
    gymnasium.register("ENV_ID", entry_point="NAME:Corridor", max_episode_steps=50, reward_threshold=0.8)


class Corridor(gymnasium.Env[Any, Any]):
    """Step left or right until the right end is reached; each step costs a little.

    Args:
        length: fields; ``--env-set length=9`` makes it longer on every member.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, length: int = 5, render_mode: str | None = None) -> None:
        self.length, self.render_mode, self.place = length, render_mode, 0
        self.observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(0, self.length - 1))
        return self._shown(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = min(max(self.place + (1 if action else -1), 0), self.length - 1)
        is_there = self.place == self.length - 1
        return self._shown(), 1.0 if is_there else -0.02, is_there, False, {}

    def render(self) -> Any:
        """The corridor from above, ``[10, 10 * length, 3]``; for `shoal play --out`."""
        picture = np.full((10, 10 * self.length, 3), 240, np.uint8)
        picture[:, -10:] = (120, 200, 120)
        picture[2:8, 10 * self.place + 2 : 10 * self.place + 8] = (40, 60, 200)
        return picture

    def _shown(self) -> Any:
        return np.array([self.place / (self.length - 1), 1 / self.length], np.float32)
'''
