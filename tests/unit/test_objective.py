"""An objective whose gradient is autograd's runs on the engine as one whose gradient is written out."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit import autograd
from tests.unit.learning import assert_close, learners, run_of, update

from shoal.training.algorithms.on_policy import Batch, actor_critic
from shoal.training.algorithms.ppo import PPO, Clipped
from shoal.training.algorithms.ppo_config import PPOConfig
from shoal.training.manifest import Manifest, Mode
from shoal.training.state import digest
from shoal.training.tasks import Task
from shoal.training.tasks.base import Floats

pytestmark = pytest.mark.usefixtures("one_thread")


class ByTorch(PPO):
    """PPO with nothing written out."""

    def objective(self, settings: PPOConfig, manifest: Manifest, task: Task) -> Clipped:
        return Backward(settings, actor_critic(settings, manifest, task))


class Backward(Clipped):
    """A loss in torch, and what ``backward`` makes of it in one flat vector."""

    def gradient(self, batch: Batch) -> Floats:
        parameters = autograd.leaves(self.model)
        parts = autograd.loss(parameters, batch, self.settings)
        parts["loss"].backward()
        self._measured = {name: part.item() for name, part in parts.items() if name != "loss"}
        made = [each.grad for each in parameters.values()]
        flat = [np.zeros(each.shape) if each is None else each.numpy() for each in made]
        return np.concatenate([each.ravel() for each in flat]).astype(np.float32)

    def measures(self) -> dict[str, float]:
        return self._measured


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_it_ends_where_the_written_out_one_does(task: str, mode: Mode) -> None:
    run = run_of(PPO(), task, mode)
    written, by_torch = learners(PPO(), run, 2), learners(ByTorch(), run, 2)
    for _ in range(2):
        stats = []
        for peers in (written, by_torch):
            for peer, share in zip(peers, (64, 128), strict=True):
                peer.collect(share)
            stats.append(update(peers)[0][0].metrics)
            assert len({digest(peer.export_state()) for peer in peers}) == 1
        assert_close(written[0].policy_arrays(), by_torch[0].policy_arrays(), 1e-4)
        assert stats[0] == pytest.approx(stats[1], rel=1e-2, abs=1e-3)
