"""Policies as they were: what `shoal.training.tasks.cast.Past` seats are played by.

A node keeps the parameters that its policies had at past epochs, as far back as the oldest age that a cast of the
recipe names (`shoal.training.tasks.cast.named`); where none is named, nothing is kept. Every epoch is kept if that is
no more than ``MAX_VERSIONS`` of them and ``MAX_BYTES`` for all policies together, and else only every k-th, with the
smallest k that fits. Which they are follows from the epoch alone, so nodes that have been there as long play the same.

What plays is the newest kept version that is at least as old as the seat says; so with every k-th kept, one that is up
to k - 1 epochs older. Where nothing is as old, at the beginning of a run, the oldest there is plays; where there is
nothing at all, the policy as it is now.

A policy's past is this node's own. It lies in the run's folder, a file for each epoch, so that a worker that was killed
goes on with it. A newcomer has none, and what cannot be read is left out: both begin anew, with what is there from then
on. Every seat of an age has a model of its own in memory beside that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.plausible import as_floats
from shoal.training.algorithms.takes import TakeModel
from shoal.training.state import check_fit, decode_arrays, encode_arrays
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Actor, Past

log = logging.getLogger(__name__)

MAX_VERSIONS: Final = 32
"""Of one policy."""
MAX_BYTES: Final = 256 * 1024 * 1024
"""Of all versions of all policies, and as much again on disk."""
FOLDER: Final = "past"
_FILE: Final = "{}.safetensors"


class Pasts:
    """Of the policies of one run, on one node."""

    def __init__(self, seats: Iterable[Past], models: Mapping[str, TakeModel], make: Callable[[str], Any]) -> None:
        """Keep nothing yet.

        Args:
            seats: that casts name.
            models: the policies as they are, by name; they change under way.
            make: gives another model of a policy's kind.

        Raises:
            UsageError: if a seat names no policy, or one that is too large to be kept.
        """
        self._models, self._make = models, make
        self._oldest: dict[str, int] = {}
        for seat in seats:
            if seat.policy not in models:
                raise UsageError(f"a cast names the past of {seat.policy[:80]!r}, which is no policy of the recipe")
            self._oldest[seat.policy] = max(seat.age, self._oldest.get(seat.policy, 0))
        self._strides = {name: _stride(name, age, self._room(name)) for name, age in self._oldest.items()}
        self._kept: dict[str, dict[int, Floats]] = {name: {} for name in self._oldest}  # by epoch, ascending
        self._playing: dict[Past, tuple[int, Any]] = {}
        self._folder: Path | None = None

    def _room(self, policy: str) -> int:
        """Versions of a policy that there is room for."""
        return min(MAX_VERSIONS, MAX_BYTES // (len(self._oldest) * max(1, self._models[policy].flat.nbytes)))

    def __bool__(self) -> bool:
        """Whether anything is to be kept."""
        return bool(self._oldest)

    def epochs(self, policy: str) -> tuple[int, ...]:
        """Those at which a policy is kept."""
        return tuple(self._kept.get(policy, ()))

    # --- keeping ---

    def settle_in(self, folder: Path) -> None:
        """Keep it in a folder as well, and go on from what is there."""
        self._folder = folder / FOLDER
        for path in sorted(self._folder.glob(_FILE.format("[0-9]*"))):
            try:
                arrays, meta = decode_arrays(path.read_bytes())
                check_fit(arrays, {name: self._models[name].flat for name in arrays if name in self._models})
            except (ProtocolError, OSError) as error:
                log.warning("a past policy in %s cannot be read (%s): it is left out", path, error)
                path.unlink(missing_ok=True)
                continue
            epoch = meta.get("epoch")
            if type(epoch) is int:
                for name in self._kept.keys() & arrays.keys():
                    self._kept[name][epoch] = as_floats(arrays[name])
        for name, kept in self._kept.items():
            room = _versions(self._oldest[name], self._strides[name])
            self._kept[name] = dict(sorted(kept.items())[-room:])

    def keep(self, epoch: int) -> None:
        """The policies are as they are at this epoch; the first time that something is played in it."""
        new = [name for name, stride in self._strides.items() if epoch % stride == 0]
        for name in new:
            kept = {each: flat for each, flat in self._kept[name].items() if each < epoch}
            kept[epoch] = self._models[name].flat.copy()
            first = max((each for each in kept if each <= epoch - self._oldest[name]), default=0)
            self._kept[name] = {each: flat for each, flat in kept.items() if each >= first}
        if new and self._folder is not None:
            self._write(self._folder, epoch, new)

    def _write(self, folder: Path, epoch: int, names: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / _FILE.format(epoch)
        half = path.with_name(path.name + ".part")
        half.write_bytes(encode_arrays({name: self._kept[name][epoch] for name in names}, {"epoch": epoch}))
        half.replace(path)
        needed = {_FILE.format(each) for kept in self._kept.values() for each in kept}
        for old in folder.iterdir():
            if old.name not in needed:
                old.unlink(missing_ok=True)

    # --- playing ---

    def actor(self, seat: Past, epoch: int) -> Actor:
        """Who plays a seat at an epoch.

        Raises:
            UsageError: if its cast did not name it.
        """
        if self._oldest.get(seat.policy, -1) < seat.age:
            raise UsageError(
                f"a cast gives {seat}, which it did not name, so nothing that old is kept; give it an attribute named"
            )
        kept = self._kept[seat.policy]
        old = [each for each in kept if each <= epoch - seat.age]
        found = max(old) if old else min((each for each in kept if each <= epoch), default=epoch)
        if found not in kept:
            return _acting(self._models[seat.policy])
        had, model = self._playing.get(seat, (None, None))
        if model is None:
            model = self._make(seat.policy)
        if had != found:
            model.flat[:] = kept[found]
            self._playing[seat] = found, model
        return _acting(model)


def _acting(model: Any) -> Actor:
    """A model, which acts."""
    acting: Actor = model
    return acting


def _stride(policy: str, oldest: int, room: int) -> int:
    """Every how many-th epoch is kept, so that no more versions are than there is room for."""
    if room < 2:
        raise UsageError(f"the policy {policy} is too large for its past to be kept, {MAX_BYTES} bytes being the most")
    return next(stride for stride in range(1, oldest + 2) if _versions(oldest, stride) <= room)


def _versions(oldest: int, stride: int) -> int:
    """That are kept at most: those younger than the oldest age, and one that is as old."""
    return math.ceil(oldest / stride) + 1
