"""Policies that never change: what `shoal.training.tasks.cast.Fixed` seats are played by, exactly as a CID names it.

The weights are fetched before anything is played that names them (`shoal.training.effects.Fetch`): from the members, or
whoever else this node is connected to. The content is a state of a run of this recipe or of another with such a policy,
or the ``policy.safetensors`` of one; what is read of it are the parameters of one policy.

While nobody gives them, the seat's ``otherwise`` plays in its place, and if there is none nothing is played: the node
says what it waits for and asks again. What comes and is no such policy (another shape, values that are not finite or
that no learner reaches, more bytes than a state of this recipe can have) will never be one, since the CID names these
bytes: the run fails on this node, with that for its reason.

What a fixed policy does is proven like any other act of a policy here, and no policy learns from it. Each has a model
of its own in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.training.algorithms.plausible import MAX_PARAMETER
from shoal.training.algorithms.takes import TakeModel
from shoal.training.effects import Fetch, Fetched
from shoal.training.state import check_fit, decode_arrays
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Actor, Fixed
from shoal.training.tasks.failures import TaskFailedError

MAX_FIXED: Final = 16
"""Of one recipe."""
SLACK_BYTES: Final = 1024 * 1024
"""What a state says beside its arrays."""


class Fixeds:
    """Of one recipe, on one node."""

    def __init__(
        self, seats: Iterable[Fixed], models: Mapping[str, TakeModel], make: Callable[[str], Any], max_bytes: int
    ) -> None:
        """Have none yet.

        Args:
            seats: that casts name.
            models: the policies as they are, by name.
            make: gives another model of a policy's kind.
            max_bytes: of a content that holds weights.

        Raises:
            UsageError: if a seat names no policy, or there are too many.
        """
        self._seats = tuple(seats)
        self._make, self._max_bytes = make, max_bytes
        self._playing: dict[Fixed, Any] = {}
        if len(self._seats) > MAX_FIXED:
            raise UsageError(
                f"the casts of a recipe name {len(self._seats)} fixed policies; at most {MAX_FIXED} can be"
            )
        for seat in self._seats:
            if seat.policy not in models:
                raise UsageError(f"a cast fixes the policy {seat.policy[:80]!r}, which is none of the recipe")

    def fetching(self) -> Generator[Fetch, Fetched | None, bool]:
        """Have what is not here yet; gives whether everything is here that something has to be played by.

        Raises:
            TaskFailedError: if a content is not the weights of such a policy.
        """
        is_ready = True
        for seat in self._seats:
            if seat in self._playing:
                continue
            waits = seat.otherwise is None
            fetched = yield Fetch(seat.cid, self._max_bytes, waits)
            if fetched is not None and fetched.refusal:
                raise TaskFailedError(f"the weights {seat.cid} of {seat.policy} cannot be had: {fetched.refusal}")
            if fetched is not None and fetched.data is not None:
                self._playing[seat] = self._model(seat, fetched.data)
            else:
                is_ready = is_ready and not waits
        return is_ready

    def _model(self, seat: Fixed, data: bytes) -> Any:
        model = self._make(seat.policy)
        try:
            weights = weights_of(seat.policy, data, model.parameters)
        except ProtocolError as error:
            raise TaskFailedError(
                f"the content {seat.cid} cannot play {seat.policy}: {error}; name one that has such a policy"
            ) from error
        for name, view in model.parameters.items():
            view[...] = weights[name]
        return model

    def actor(self, seat: Fixed) -> Actor | None:
        """Who plays a seat; None while its weights are not here.

        Raises:
            UsageError: if its cast did not name it.
        """
        if seat not in self._seats:
            raise UsageError(
                f"a cast gives {seat}, which it did not name, so nobody fetched it; give it an attribute named"
            )
        found: Actor | None = self._playing.get(seat)
        return found


def weights_of(policy: str, data: bytes, like: Mapping[str, Floats]) -> dict[str, Any]:
    """A policy's parameters, by name, out of a state of a run.

    Args:
        policy: its name in a recipe; a state of one policy alone is taken as well.
        data: as `shoal.training.state.encode_arrays` wrote it.
        like: what they have to be like.

    Raises:
        ProtocolError: if they are not in it, or not such.
    """
    arrays, _ = decode_arrays(data)
    for prefix in (f"{policy}/parameters/", "parameters/"):
        found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        if found:
            break
    else:
        held = ", ".join(sorted({name.partition("/parameters/")[0] for name in arrays if "/parameters/" in name}))
        raise ProtocolError(f"there is no policy {policy[:80]!r} in it; it has {held[:200] or 'none'}")
    check_fit(found, like)
    for name, array in found.items():
        if not np.abs(array).max(initial=0.0) <= MAX_PARAMETER:
            raise ProtocolError(f"{name[:80]!r} holds a value beyond {MAX_PARAMETER:g}, which no learner reaches")
    return found
