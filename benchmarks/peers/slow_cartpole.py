"""CartPole-v1 with a step that sleeps for as long as the environment says: a slow machine, without the load of one.

Under the scheme ``slow`` (an entry point that `plugin_folder` writes), so that a node finds it as it finds any task
that somebody has installed: ``slow:CartPole-v1``. The time is that of one step of one environment, in seconds, from
``SHOAL_STEP_SLEEP_S``; each node has its own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from shoal.training.tasks import Transition, VectorEnv
from shoal.training.tasks.base import Actions, Floats
from shoal.training.tasks.gym import GymTask

SLEEP = "SHOAL_STEP_SLEEP_S"


class SlowTask(GymTask):
    """As `GymTask`, in a hurry to nowhere."""

    version = 1

    def __init__(self, env_id: str) -> None:
        super().__init__(env_id)
        self.name = f"slow:{env_id}"

    def make(self, num_envs: int) -> VectorEnv:
        """Environments that sleep."""
        return SlowEnv(super().make(num_envs), float(os.environ.get(SLEEP, "0")))


class SlowEnv:
    """Environments one after the other, each of which takes so long for a step."""

    def __init__(self, envs: VectorEnv, sleep_s: float) -> None:
        self.num_envs = envs.num_envs
        self._envs = envs
        self._sleep_s = sleep_s * envs.num_envs

    def reset(self, seeds: list[int]) -> Floats:
        """Start all anew."""
        return self._envs.reset(seeds)

    def step(self, actions: Actions) -> Transition:
        """Act, and take the time for it."""
        time.sleep(self._sleep_s)
        return self._envs.step(actions)

    def close(self) -> None:
        """Close them."""
        self._envs.close()


def plugin_folder(folder: Path) -> str:
    """Make a folder that installs this module, for a node's ``PYTHONPATH``; gives that."""
    info = folder / "slow_cartpole-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow_cartpole\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[shoal.tasks]\nslow = slow_cartpole:SlowTask\n")
    parts = (str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(part for part in parts if part)
