"""``shoal play`` and ``shoal export``: a trained policy, looked at and taken elsewhere.

A run that is done has left a file, and no node is needed. Of one that goes on, the node is asked for what it holds now;
and one that somebody published is fetched by its name (`shoal model`).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.cli.common import AsJson, Profile, connect, console, print_json, profile_paths
from shoal.node.api.requests import GetModel
from shoal.protocol.errors import NoDaemonError, ShoalError, UsageError

if TYPE_CHECKING:
    from shoal.training.trained import Trained

_OWNED: Final = re.compile(r"12D3KooW\w+/")
"""How OWNER/NAME begins."""

What = Annotated[
    str,
    typer.Argument(
        metavar="SWARM|FILE|MODEL",
        help="A run of this profile, the policy.safetensors that one has left, or a model that holds such a file.",
    ),
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

    trained = _trained(what, profile)
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

    trained = _trained(what, profile)
    try:
        export_onnx(trained, to)
    except OSError as error:
        raise ShoalError(f"{to} cannot be written: {error.strerror}") from error
    facts = {"task": trained.manifest.task, "algorithm": trained.manifest.algorithm, "out": str(to)}
    if as_json:
        print_json(facts)
    else:
        console().print(f"{to}: the policy of {facts['task']}, with its normaliser", soft_wrap=True, markup=False)


def _trained(what: str, profile: str) -> Trained:
    """The policy that a word names: what a run has left, or what the node holds of one that goes on.

    Raises:
        UsageError: if there is none.
        ProtocolError: if a file is none.
    """
    from shoal.training.state import decode_arrays
    from shoal.training.trained import NotDoneError, find_trained, read_trained, trained_of

    if not Path(what).exists() and _OWNED.match(what):
        return _fetched(what, profile)
    try:
        return read_trained(find_trained(what, profile_paths(profile).root / "swarms"))
    except NotDoneError as not_done:
        try:
            with connect(profile) as node:
                manifest, state = node.manifest(not_done.swarm), node.policy(not_done.swarm)
        except NoDaemonError as error:
            raise UsageError(f"{not_done}; while it goes on, the node has it: start that with `shoal up`") from error
    return trained_of(decode_arrays(state)[0], {"manifest": manifest})


def _fetched(model: str, profile: str) -> Trained:
    """The policy that a model holds."""
    from shoal.training.trained import FILE, read_trained

    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        out = Path(folder) / "model"
        with connect(profile) as node, console(stderr=True).status(f"fetching {model} …"):
            node.get_model(GetModel(model=model, out=str(out)))
        file = out if out.is_file() else out / FILE
        if not file.is_file():
            raise UsageError(f"{model} holds no {FILE}; `shoal model show {model}` tells what it holds")
        return read_trained(file)
