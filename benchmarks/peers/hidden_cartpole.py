"""CartPole-v1 whose velocities are not shown: where the cart is and how the pole leans, and a policy has to remember.

Under the scheme ``hidden`` (an entry point that `plugin_folder` writes), so that a node finds it as it finds any task
that somebody has installed: ``hidden:CartPole-v1``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from shoal.training.tasks import Box, Transition, VectorEnv
from shoal.training.tasks.base import Actions, Observations
from shoal.training.tasks.gym import GymTask

SHOWN: Final = [0, 2]


class HiddenTask(GymTask):
    """As `GymTask`, half of it shown."""

    version = 1

    def __init__(self, env_id: str) -> None:
        super().__init__(env_id)
        self.name = f"hidden:{env_id}"
        self.observation_space = Box(len(SHOWN))

    def make(self, num_envs: int) -> VectorEnv:
        """Environments that hide."""
        return HiddenEnv(super().make(num_envs))

    def make_plain(self, num_envs: int) -> VectorEnv:
        """The same."""
        return self.make(num_envs)


class HiddenEnv:
    """Environments of which not all is shown."""

    def __init__(self, envs: VectorEnv) -> None:
        self.num_envs = envs.num_envs
        self._envs = envs

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start all anew."""
        return np.ascontiguousarray(self._envs.reset(seeds)[:, SHOWN])

    def step(self, actions: Actions) -> Transition:
        """Act."""
        step = self._envs.step(actions)
        return replace(
            step,
            observations=np.ascontiguousarray(step.observations[:, SHOWN]),
            final_observations={index: each[SHOWN] for index, each in step.final_observations.items()},
        )

    def close(self) -> None:
        """Close them."""
        self._envs.close()


def plugin_folder(folder: Path) -> str:
    """Make a folder that installs this module, for a node's ``PYTHONPATH``; gives that."""
    info = folder / "hidden_cartpole-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hidden_cartpole\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[shoal.tasks]\nhidden = hidden_cartpole:HiddenTask\n")
    parts = (str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(part for part in parts if part)
