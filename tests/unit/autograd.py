"""The networks and PPO's loss as torch differentiates them, in float64: what the written-out gradient is held to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.distributions import Categorical, Independent, Normal

from shoal.training.algorithms.on_policy import Batch
from shoal.training.algorithms.ppo_config import Correction, PPOConfig
from shoal.training.algorithms.ppo_corrected import MAX_WEIGHT
from shoal.training.models.actor_critic import ActorCritic


def leaves(model: ActorCritic) -> dict[str, torch.Tensor]:
    """The parameters of a model."""
    return {
        name: torch.tensor(each, dtype=torch.float64, requires_grad=True) for name, each in model.parameters.items()
    }


def judge(
    parameters: Mapping[str, torch.Tensor], observations: np.ndarray | torch.Tensor, actions: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies and values, each ``[B]``; actions are ``[B]`` or ``[size, B]``."""
    outputs, values = (_through(parameters, network, observations) for network in ("actor", "critic"))
    if "actor/log_std" in parameters:
        policy = Independent(Normal(outputs, parameters["actor/log_std"].exp().expand_as(outputs)), 1)
    else:
        policy = Categorical(logits=outputs)
    return policy.log_prob(torch.from_numpy(actions.T.copy())), policy.entropy(), values.squeeze(1)


def loss(
    parameters: Mapping[str, torch.Tensor], batch: Batch, config: PPOConfig, seen: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The loss and its parts; ``seen`` stands for the observations, where something lies below the networks."""
    log_probs, entropies, values = judge(parameters, batch.observations if seen is None else seen, batch.actions)
    old, advantages, returns, old_values = (
        torch.from_numpy(each.astype(np.float64))
        for each in (batch.log_probs, batch.advantages, batch.returns, batch.values)
    )
    near, weights = old, torch.ones(())
    if config.correction is not Correction.NONE:
        near = torch.from_numpy(batch.proximal.astype(np.float64))
        if config.correction is Correction.A3PO:
            alpha = torch.from_numpy(1 / np.maximum(batch.ages, 1))
            near = (alpha * old + (1 - alpha) * log_probs).detach()
        weights = (near - old).exp().clamp(max=MAX_WEIGHT)
    ratios = (log_probs - near).exp()
    clipped = ratios.clamp(1 - config.clip_range, 1 + config.clip_range)
    policy_loss = -(weights * torch.min(ratios * advantages, clipped * advantages)).mean()
    errors = (values - returns).square()
    if config.value_clip_range is not None:
        kept = old_values + (values - old_values).clamp(-config.value_clip_range, config.value_clip_range)
        errors = torch.max(errors, (kept - returns).square())
    value_loss = 0.5 * errors.mean()
    entropy = entropies.mean()
    whole = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
    return {
        "loss": whole,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratios - 1 - ratios.log()).mean(),
        "clip_fraction": (ratios != clipped).double().mean(),
    }


def gradient(model: ActorCritic, batch: Batch, config: PPOConfig) -> np.ndarray:
    """Of the loss by all parameters, in the order of ``model.flat``; zeros where it does not depend on one."""
    parameters = leaves(model)
    parts = torch.autograd.grad(
        loss(parameters, batch, config)["loss"], list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return np.concatenate([part.numpy().ravel() for part in parts])


def _through(
    parameters: Mapping[str, torch.Tensor], network: str, observations: np.ndarray | torch.Tensor
) -> torch.Tensor:
    layers = sum(name.startswith(f"{network}/") and name.endswith("/weight") for name in parameters)
    hidden = torch.as_tensor(observations, dtype=torch.float64)
    for layer in range(layers):
        hidden = torch.tanh(hidden) if layer else hidden
        hidden = hidden @ parameters[f"{network}/{layer}/weight"].T + parameters[f"{network}/{layer}/bias"]
    return hidden
