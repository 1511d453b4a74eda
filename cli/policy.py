"""``shoal play`` and ``shoal export``: a trained policy, looked at and taken elsewhere. Neither needs a node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.common import AsJson, Profile, console, print_json, profile_paths
from shoal.protocol.errors import ShoalError, UsageError

What = Annotated[
    str,
    typer.Argument(metavar="SWARM|FILE", help="A run of this profile that is done, or a policy.safetensors of one."),
]


def play(
    what: What,
    episodes: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="X.gif|X.mp4", help="Record them here.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="From which their beginnings are drawn.")] = 0,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Let a trained policy play, without chance: what it earns, and with --out how it looks."""
    from shoal.training.showing import show  # loads all that learning needs
    from shoal.training.trained import find_trained, read_trained

    trained = read_trained(find_trained(what, profile_paths(profile).root / "swarms"))
    returns = show(trained, episodes=episodes, seed=seed, out=out)
    if as_json:
        print_json({"returns": returns, "out": None if out is None else str(out)})
        return
    for number, each in enumerate(returns, 1):
        console().print(f"episode {number}  return {each:g}")
    if out is not None:
        console().print(f"recorded in {out}", soft_wrap=True, markup=False)


def export(
    what: What,
    to: Annotated[Path, typer.Option(metavar="X.onnx", help="Where to.")],
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Write a trained policy as ONNX, with its normaliser: what the environment shows in, its action out."""
    if to.suffix.lower() != ".onnx":
        raise UsageError(f"{to.name} is of no kind that is written; give a name that ends with .onnx")
    from shoal.training.exporting import export_onnx  # likewise
    from shoal.training.trained import find_trained, read_trained

    trained = read_trained(find_trained(what, profile_paths(profile).root / "swarms"))
    try:
        export_onnx(trained, to)
    except OSError as error:
        raise ShoalError(f"{to} cannot be written: {error.strerror}") from error
    facts = {"task": trained.manifest.task, "algorithm": trained.manifest.algorithm, "out": str(to)}
    if as_json:
        print_json(facts)
    else:
        console().print(f"{to}: the policy of {facts['task']}, with its normaliser", soft_wrap=True, markup=False)
