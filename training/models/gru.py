"""A recurrent model over whole takes: a gated recurrent unit (Cho et al., arXiv 1406.1078) before acts and values.

In every turn it sees the sight and the act before it, so what it does can depend on all that it saw and did in the
play: on how others act, for one. An update goes back through whole takes.

A take's state is kept from one act to the next. It is a function of the take and the parameters alone: where these
have changed meanwhile, or a take is not known, it is computed from the take's beginning.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from shoal.training.models.bodies import BodyModel, Turns, whole
from shoal.training.models.flat import Spec
from shoal.training.tasks.base import Discrete
from shoal.training.tasks.play import Role, Take

MAX_KEPT: Final = 4096
"""Takes whose states are kept."""


class GRU(BodyModel):
    """The model called ``gru``. Its features are the units' states."""

    is_recurrent = True

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        width: int = 64,
        hidden_sizes: Sequence[int] = (64,),
        central: int = 0,
        initial_log_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Initialise it; see `BodyModel`.

        Raises:
            UsageError: if it cannot be of this width.
        """
        super().__init__(roles, central)
        self._width = whole("width", width, 1, 4096)
        inputs = self.sizes[0] + self._outputs
        seen = {
            "encode/in": Spec((3 * width, inputs), inputs**-0.5),
            "encode/in_bias": Spec((3 * width,)),
            "encode/again": Spec((3 * width, width), width**-0.5),
            "encode/again_bias": Spec((3 * width,)),
        }
        self._begin(seen, width, hidden_sizes, initial_log_std, seed)
        self._kept: OrderedDict[int, tuple[Take, int, torch.Tensor]] = OrderedDict()  # by the take's identity
        self._kept_for = 0  # the checksum of the parameters

    def see(self, turns: Turns) -> torch.Tensor:
        """``[S, T, width]``."""
        before = functional.pad(self._as_numbers(turns.acts)[:, :-1], (0, 0, 1, 0))
        given = torch.cat([turns.sights, before], dim=-1)
        return self._states(given, torch.zeros((len(turns), self._width)))

    def _states(self, given: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """``[S, T, width]``, from the states ``[S, width]`` on, for what is given, ``[S, T, inputs]``."""
        own = self._parameters.tensors
        given = functional.linear(given, own["encode/in"], own["encode/in_bias"])
        states = []
        for turn in range(given.shape[1]):
            reset, update, new = given[:, turn].chunk(3, dim=-1)
            again = functional.linear(state, own["encode/again"], own["encode/again_bias"])
            again_reset, again_update, again_new = again.chunk(3, dim=-1)
            keep = torch.sigmoid(update + again_update)
            proposed = torch.tanh(new + torch.sigmoid(reset + again_reset) * again_new)
            state = keep * state + (1 - keep) * proposed
            states.append(state)
        return torch.stack(states, dim=1)

    def _as_numbers(self, acts: torch.Tensor) -> torch.Tensor:
        """``[..., outputs]``: of numbered acts, one is 1."""
        return functional.one_hot(acts, self._outputs).float() if isinstance(self.acts, Discrete) else acts

    # --- acting ---

    def _newest_features(self, takes: Sequence[Take]) -> torch.Tensor:
        """The states where these takes stand."""
        now = zlib.crc32(self.flat)  # type: ignore[arg-type]  # an array is a buffer
        if now != self._kept_for:
            self._kept.clear()
            self._kept_for = now
        by_missing: defaultdict[int, list[int]] = defaultdict(list)
        for index, take in enumerate(takes):
            by_missing[len(take.acts) + 1 - self._known(take)].append(index)
        found = torch.empty((len(takes), self._width))
        for missing, chosen in by_missing.items():
            given = np.stack([self._given(takes[index], missing) for index in chosen])
            before = torch.stack([self._state(takes[index]) for index in chosen])
            found[chosen] = self._states(torch.from_numpy(given), before)[:, -1]
        for take, state in zip(takes, found, strict=True):
            self._kept[id(take)] = (take, len(take.acts) + 1, state)
            self._kept.move_to_end(id(take))
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return found

    def _known(self, take: Take) -> int:
        """Up to which sight the state of a take is known."""
        kept = self._kept.get(id(take))
        return kept[1] if kept is not None and kept[1] <= len(take.acts) else 0

    def _state(self, take: Take) -> torch.Tensor:
        return self._kept[id(take)][2] if self._known(take) else torch.zeros(self._width)

    def _given(self, take: Take, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """``[count, inputs]`` of the newest sights."""
        size = self.sizes[0]
        given = np.zeros((count, size + self._outputs), np.float32)
        first = len(take.acts) + 1 - count
        for row, turn in enumerate(range(first, first + count)):
            given[row, :size] = take.sights[turn]
            if turn and isinstance(self.acts, Discrete):
                given[row, size + take.acts[turn - 1]] = 1
            elif turn:
                given[row, size:] = take.acts[turn - 1]
        return given
