"""A trained policy on its own: read from the ``policy.safetensors`` that a run leaves, and acting without chance.

The file holds the policy's parameters, the moments by which observations are normalised, and the run's manifest; so who
has it knows what the policy acts in and how. Code is not in it: the task and the algorithm have to be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.protocol.codec import from_plain
from shoal.protocol.errors import UsageError
from shoal.training.algorithms import load_algorithm
from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.normalizers import mean_and_scale, normal
from shoal.training.exchange.averager import Arrays, Moments
from shoal.training.manifest import Manifest
from shoal.training.models.policy import Recurrent
from shoal.training.requirements import check_loaded, requirements
from shoal.training.state import check_fit, decode_arrays
from shoal.training.tasks import Task, load_task
from shoal.training.tasks.base import Actions, Floats, Observations

FILE: Final = "policy.safetensors"
MAX_FILE_BYTES: Final = 2**30
_PARAMETERS: Final = "parameters/"
_MOMENTS: Final = "moments/observation/"


class NotDoneError(UsageError):
    """A run has left no policy yet.

    Attributes:
        swarm: its name.
    """

    def __init__(self, swarm: str) -> None:
        super().__init__(f"the run {swarm} has left no policy yet: it is written when the run is done")
        self.swarm = swarm


@dataclass(frozen=True, slots=True)
class Trained:
    """A policy as a run left it.

    Attributes:
        manifest: of the run.
        task: the manifest's.
        model: with the policy's parameters.
        normal: mean and scale by which observations are normalised, ``[observation_size]`` each; None: they are not.
    """

    manifest: Manifest
    task: Task
    model: Any
    normal: tuple[Floats, Floats] | None

    def acting(self) -> Callable[[Observations], Actions]:
        """What acts in one environment from the beginning of an episode on, by observations ``[1, *shape]``."""
        model, moments = self.model, self.normal

        def seen(shown: Observations) -> Observations:
            return shown if moments is None else normal(shown, *moments)

        if not isinstance(model, Recurrent):
            return lambda shown: model.act_greedily(seen(shown))
        memory = np.zeros((1, model.memory_size), np.float32)
        return lambda shown: model.act_greedily(seen(shown), memory)


def read_trained(path: Path) -> Trained:
    """The policy of a file.

    Raises:
        UsageError: if there is none, it does not say how it was trained, or what it needs is not installed.
        ProtocolError: if it is no policy, or none of such a run.
    """
    return trained_of(*_read(path))


def task_of(path: Path) -> str:
    """The name of the task that the policy of a file was trained for; raises as `read_trained`."""
    return _manifest_in(_read(path)[1]).task


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path} is too large for a policy; give the {FILE} of a run")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return decode_arrays(data)


def _manifest_in(meta: dict[str, Any]) -> Manifest:
    if not isinstance(meta.get("manifest"), dict):
        raise UsageError("this file does not say how it was trained; give the policy.safetensors that a run ended with")
    return from_plain(Manifest, meta["manifest"])


def trained_of(arrays: Arrays, meta: dict[str, Any]) -> Trained:
    """The policy of what such a file holds; raises as `read_trained`."""
    manifest = _manifest_in(meta)
    if manifest.is_recipe or manifest.is_loop:
        raise UsageError(f"{manifest.task} has no single policy that acts alone; play and export are for tasks of one")
    task, algorithm = load_task(manifest.task, manifest.env_arguments), load_algorithm(manifest.algorithm)
    check_loaded(manifest, requirements(manifest.algorithm, algorithm.version, manifest.task, task.version))
    if not isinstance(algorithm, OnEngine):
        raise UsageError(f"{manifest.algorithm} is another package's algorithm, whose policies Shoal cannot rebuild")
    settings = algorithm.configured(manifest, task)
    model = algorithm.objective(settings, manifest, task).model
    given = {name.removeprefix(_PARAMETERS): array for name, array in arrays.items() if name.startswith(_PARAMETERS)}
    check_fit(given, dict(model.parameters))
    for name, view in model.parameters.items():
        view[...] = given[name]
    if not settings.normalize_observations:
        return Trained(manifest, task, model, None)
    shape = task.observation_space.shape
    moments = {name: array for name, array in arrays.items() if name.startswith(_MOMENTS)}
    check_fit(moments, Moments.none(shape).to_arrays("observation"))
    read = Moments.from_arrays(moments, "observation")
    return Trained(manifest, task, model, mean_and_scale(read) if read.count else None)


def find_trained(what: str, swarms: Path) -> Path:
    """The file that a word names: a path of one, or the beginning of a swarm's name.

    Args:
        what: the word.
        swarms: the folder of this profile's runs.

    Raises:
        NotDoneError: if it names a run that has left no such file yet.
        UsageError: if it names none, or more than one.
    """
    path = Path(what)
    if path.is_dir():
        path = path / FILE
    if path.exists() or "/" in what or path.suffix:
        return path
    found = [each for each in swarms.glob("*") if each.name.startswith(what)] if what.isalnum() else []
    if len(found) > 1:
        raise UsageError(f"{what!r} could be any of {len(found)} swarms; write more of its name")
    if not found:
        raise UsageError(f"{what[:80]!r} is neither a file nor a swarm of this profile; `shoal swarm ls` shows those")
    if not (found[0] / FILE).exists():
        raise NotDoneError(found[0].name)
    return found[0] / FILE
