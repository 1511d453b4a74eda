"""An actor and a critic on one network of torch's, in one flat vector of parameters.

Both see the same features (`shoal.training.models.cnn`) through one linear layer each, orthogonal at first with gains
of 0.01 and 1, as "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022) has it for Atari. The
head, and so the loss, is that of every policy (`shoal.training.models.heads`): autograd begins below the outputs.

Images go through in parts of 64: on one core 256 at once took more than twice as long for each.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch.nn import functional

from shoal.training.models.cnn import Image, as_planes
from shoal.training.models.flat import FlatParameters, OnFlat, Spec
from shoal.training.models.heads import head_of, likeliest, num_outputs, sample
from shoal.training.models.policy import Course, judge_in_parts
from shoal.training.tasks.base import Actions, ActionSpace, Continuous, Floats, Observations

_CHUNK: Final = 64
_MAX_SIZES: Final = 8  # of batches, whose arrays are kept


class ImagePolicy(OnFlat):
    """The policy and the values; see `shoal.training.models.policy.Policy`."""

    def __init__(self, image: Image, action_space: ActionSpace, *, initial_log_std: float, seed: int) -> None:
        self.action_space = action_space
        self.image = image
        specs = {
            **image.specs,
            "actor/weight": Spec((num_outputs(action_space), image.features), gain=0.01),
            "actor/bias": Spec((num_outputs(action_space),)),
            "critic/weight": Spec((1, image.features), gain=1.0),
            "critic/bias": Spec((1,)),
        }
        if isinstance(action_space, Continuous):
            specs["actor/log_std"] = Spec((action_space.size,), fill=initial_log_std)
        self._parameters = FlatParameters(specs, seed)
        self.gradient: Floats = np.zeros_like(self.flat)
        # What autograd finds is added to this.
        self._parameters.tensor.grad = torch.from_numpy(self.gradient)
        self._passes: dict[int, ImagePasses] = {}

    def act(self, observations: Observations, rng: np.random.Generator) -> Actions:
        """Draw actions; see `shoal.training.models.heads.sample`."""
        outputs, _ = self._numbers(observations)
        return sample(self.action_space, outputs, self.parameters.get("actor/log_std"), rng)

    def act_greedily(self, observations: Observations) -> Actions:
        """The likeliest actions, as `act` would shape them."""
        return likeliest(self.action_space, self._numbers(observations)[0])

    def judge(self, observations: Observations, actions: Actions) -> tuple[Floats, Floats]:
        """The log-probabilities of actions and the values of observations, each ``[S]``; no gradient can follow."""
        with torch.no_grad():
            return judge_in_parts(self, observations, actions, _CHUNK)

    def values(self, observations: Observations) -> Floats:
        """The values ``[N]`` of observations ``[N, *shape]``."""
        return self._numbers(observations)[1]

    def passes(self, size: int) -> ImagePasses:
        """Forward and backward on batches of this size, with arrays that serve again."""
        if size not in self._passes:
            if len(self._passes) >= _MAX_SIZES:
                self._passes.clear()
            self._passes[size] = ImagePasses(self, size)
        return self._passes[size]

    def forward(self, observations: Observations) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs ``[N, outputs]`` and values ``[N]`` of observations ``[N, *shape]``."""
        own = self._parameters.tensors
        parts = [
            self.image.see(own, as_planes(observations[start : start + _CHUNK], self.image.layout))
            for start in range(0, len(observations), _CHUNK)
        ]
        features = torch.cat(parts) if parts else torch.zeros((0, self.image.features))
        outputs = functional.linear(features, own["actor/weight"], own["actor/bias"])
        return outputs, functional.linear(features, own["critic/weight"], own["critic/bias"])[:, 0]

    @property
    def gradient_parameters(self) -> dict[str, Floats]:
        """By name, views of `gradient`."""
        return self._parameters.views_of(self.gradient)

    def _numbers(self, observations: Observations) -> tuple[Floats, Floats]:
        with torch.no_grad():
            outputs, values = self.forward(observations)
        return outputs.numpy(), values.numpy()


class ImagePasses:
    """Forward and backward on batches of one size; see `shoal.training.models.policy.Passes`."""

    def __init__(self, model: ImagePolicy, size: int) -> None:
        self._model = model
        gradient = model.gradient_parameters
        self._head = head_of(
            model.action_space, size, model.parameters.get("actor/log_std"), gradient.get("actor/log_std")
        )
        self.values: Floats = np.empty(size, np.float32)
        shape = num_outputs(model.action_space), size
        self._outputs, self._d_outputs = (np.empty(shape, np.float32) for _ in range(2))
        self._graph: tuple[torch.Tensor, torch.Tensor] | None = None

    def judge(self, observations: Observations, actions: Actions, course: Course | None = None) -> Floats:
        """Log-probabilities ``[B]`` of actions; they and `values` are overwritten by the next call.

        A course is nothing to networks without memory.
        """
        outputs, values = self._graph = self._model.forward(observations)
        self._outputs[:] = outputs.detach().numpy().T
        self.values[:] = values.detach().numpy()
        self._head.judge(self._outputs, actions)
        return self._head.log_probs

    @property
    def entropy(self) -> float:
        """The policy's, the mean over what `judge` was given last."""
        return self._head.entropy

    def backward(self, d_log_probs: Floats, d_values: Floats, d_entropy: float) -> None:
        """Write the gradient of a loss of what `judge` was given last into `ImagePolicy.gradient`, all of it."""
        if self._graph is None:
            raise ValueError("judge comes before backward, once for each")
        graph, self._graph = self._graph, None  # what it holds of every layer is needed no more
        self._model.gradient[:] = 0
        self._head.backward(d_log_probs, d_entropy, self._d_outputs)
        downwards = [torch.from_numpy(self._d_outputs.T), torch.from_numpy(d_values)]
        torch.autograd.backward(graph, downwards)  # type: ignore[no-untyped-call, unused-ignore]  # torch's
