"""Stable-Baselines3's PPO with Shoal's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def ppo(config: Any, make: Callable[[], Any], batch: int, seed: int, *, is_image: bool = False) -> tuple[Any, Any]:
    """A model, and the normalised environments that it learns in.

    Args:
        config: Shoal's settings of PPO.
        make: makes one environment.
        batch: steps of all environments before an update.
        seed: of everything.
        is_image: whether the Nature network below actor and critic sees them.
    """
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    envs = VecNormalize(
        make_vec_env(make, config.num_envs, seed=seed),
        norm_obs=config.normalize_observations,
        norm_reward=config.normalize_returns,
        gamma=config.gamma,
    )
    model = PPO(
        "CnnPolicy" if is_image else "MlpPolicy",
        envs,
        learning_rate=_falling(config.learning_rate, falls=config.anneal_learning_rate),
        n_steps=batch // config.num_envs,
        batch_size=batch // config.num_minibatches,
        n_epochs=config.update_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=_falling(config.clip_range, falls=config.anneal_clip_range),
        clip_range_vf=config.value_clip_range,
        ent_coef=config.entropy_coefficient,
        vf_coef=config.value_coefficient / 2,  # its value loss is not halved
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={
            "net_arch": [] if is_image else list(config.hidden_sizes),
            "log_std_init": config.initial_log_std,
        },
        seed=seed,
        device="cpu",
    )
    return model, envs


def _falling(value: float, *, falls: bool) -> float | Callable[[float], float]:
    """A setting, or what it is when so much of the run is left."""
    return (lambda left: left * value) if falls else value
