"""How fast is learning, all in all? PPO in one process of one thread, beside Stable-Baselines3 and rlox.

Each system learns the same task for the same number of environment steps with the same settings, which are Shoal's
defaults: as many environments, steps per epoch, passes and minibatches, the same discount, learning rate, clip range
and coefficients, networks of one shape, observations and rewards normalised alike. Atari games are made by Shoal's
wrappers for both, and seen by the Nature network below actor and critic; rlox has none, and is left out there. Every
run is a process of its own with one thread for all that computes; the systems take turns, seed by seed. What is timed
are whole epochs, but for the first, in which PyTorch loads parts of itself. After it greedy episodes, 20 or of a game
2, tell whether what was fast also learned.

Besides the time on the clock there is that of the processor, which other processes on this machine disturb less; where
nothing else runs, the two are the same. The ratios are of the processor's.

    python benchmarks/training.py [--tasks gym:A,gym:B] [--systems shoal,sb3,rlox] [--steps 59392] [--batch 2048]
        [--set NAME=VALUE] [--seeds 3] [--json FILE] [--keep]

``--json`` writes rows {"task", "system", "env_steps", "env_steps_per_s", "env_steps_per_cpu_s", "return", "seed"} after
those that the file holds already, so that tasks can be run one by one; what is printed and kept is of all its rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers.sb3 import ppo

RESULT = Path(__file__).parent / "results" / "training.md"
TASKS = "gym:CartPole-v1,gym:Acrobot-v1,gym:LunarLander-v3,gym:Hopper-v5,gym:HalfCheetah-v5"
PACKAGES = {"shoal": "shoal", "sb3": "stable-baselines3", "rlox": "rlox"}
MODULES = {"shoal": "shoal", "sb3": "stable_baselines3", "rlox": "rlox"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
EPISODES = 20

Trained = tuple[Callable[[int], object], Callable[[], list[float]]]
"""What learns for so many steps more, and what plays greedy episodes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run."""

    task: str
    system: str
    env_steps: int
    env_steps_per_s: float
    env_steps_per_cpu_s: float
    mean_return: float
    seed: int

    def to_plain(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["return"] = plain.pop("mean_return")
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Row:
        return cls(**{"mean_return" if name == "return" else name: value for name, value in plain.items()})


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run is to do."""

    task: str
    seed: int
    steps: int
    batch: int
    settings: dict[str, Any]

    @property
    def env_id(self) -> str:
        return self.task.removeprefix("gym:")

    @property
    def episodes(self) -> int:
        """That are played afterwards; few of an Atari game, which takes thousands of steps."""
        return 2 if is_atari(self.env_id) else EPISODES


def config_of(plan: Plan) -> tuple[Any, Any, Any]:
    """Shoal's settings for a task, its manifest and its task."""
    from shoal.protocol.ids import PeerId
    from shoal.training.algorithms.ppo import PPO
    from shoal.training.manifest import Manifest
    from shoal.training.tasks import load_task

    task = load_task(plan.task)
    manifest = Manifest(
        owner=PeerId.of_public_key(bytes(32)),
        task=plan.task,
        algorithm="ppo",
        seed=plan.seed,
        batch_size=plan.batch,
        hyperparameters=plan.settings,
    )
    return PPO().configured(manifest, task), manifest, task


def shoal(plan: Plan) -> Trained:
    from shoal.training.algorithms.local import update_together
    from shoal.training.algorithms.ppo import PPO

    _, manifest, task = config_of(plan)
    learner = PPO().learner(manifest, task, peer=manifest.owner)

    def learn(steps: int) -> None:
        for _ in range(steps // plan.batch):
            learner.collect(plan.batch)
            update_together({manifest.owner: learner})

    return learn, lambda: learner.evaluate(plan.episodes, plan.seed + 1_000_003)


def sb3(plan: Plan) -> Trained:
    config, _, _ = config_of(plan)
    model, envs = ppo(
        config, lambda: made(plan.env_id, is_training=True), plan.batch, plan.seed, is_image=is_atari(plan.env_id)
    )

    def act(observation: Any) -> Any:
        shown = envs.normalize_obs(observation) if config.normalize_observations else observation
        return model.predict(shown, deterministic=True)[0]

    return lambda steps: model.learn(steps, reset_num_timesteps=False), lambda: episodes(plan, act)


def rlox(plan: Plan) -> Trained:
    import torch
    from rlox.algorithms.ppo import PPO

    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    config, _, _ = config_of(plan)
    assert tuple(config.hidden_sizes) == (64, 64), "rlox's own"
    model = PPO(
        plan.env_id,
        n_envs=config.num_envs,
        seed=plan.seed,
        n_steps=plan.batch // config.num_envs,
        n_epochs=config.update_epochs,
        batch_size=plan.batch // config.num_minibatches,
        learning_rate=config.learning_rate,
        clip_eps=config.clip_range,
        vf_coef=config.value_coefficient,
        ent_coef=config.entropy_coefficient,
        max_grad_norm=config.max_grad_norm,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_vloss=False,
        anneal_lr=False,
        normalize_obs=config.normalize_observations,
        normalize_rewards=config.normalize_returns,
    )

    def act(observation: Any) -> Any:
        if config.normalize_observations:
            observation = model.vec_normalize.normalize_obs(observation[None])[0]
        return model.predict(observation, deterministic=True).numpy()

    return model.train, lambda: episodes(plan, act)


def made(env_id: str, *, is_training: bool) -> Any:
    """An environment of Gymnasium's, or a game as Shoal wraps it."""
    import gymnasium

    from shoal.training.tasks import atari

    if not is_atari(env_id):
        return gymnasium.make(env_id)
    atari.register()
    return atari.make(env_id, {}, is_training=is_training)


def is_atari(env_id: str) -> bool:
    """Whether it is one of ALE's games."""
    return env_id.startswith("ALE/")


def episodes(plan: Plan, act: Callable[[Any], Any]) -> list[float]:
    """Undiscounted returns of greedy episodes."""
    import gymnasium
    import numpy as np

    env, returns = made(plan.env_id, is_training=False), []
    for number in range(plan.episodes):
        observation, _ = env.reset(seed=plan.seed + 1_000_003 + number)
        total, is_over = 0.0, False
        while not is_over:
            shown = np.asarray(observation) if is_atari(plan.env_id) else np.asarray(observation, np.float32)
            action = np.asarray(act(shown))
            if isinstance(env.action_space, gymnasium.spaces.Box):
                action = np.clip(action.reshape(env.action_space.shape), env.action_space.low, env.action_space.high)
            else:
                action = int(action.item())
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            is_over = terminated or truncated
        returns.append(total)
    env.close()
    return returns


def measure(system: str, plan: Plan) -> Row:
    """One run, in this process."""
    learn, play = {"shoal": shoal, "sb3": sb3, "rlox": rlox}[system](plan)
    learn(plan.batch)
    began, cpu_began = time.monotonic(), time.process_time()
    learn(plan.steps)
    speeds = (round(plan.steps / s, 1) for s in (time.monotonic() - began, time.process_time() - cpu_began))
    return Row(plan.task, system, plan.batch + plan.steps, *speeds, round(statistics.fmean(play()), 1), plan.seed)


def measured_apart(system: str, plan: Plan) -> Row:
    """One run, in a process of its own."""
    words = [sys.executable, __file__, "--one", json.dumps([system, asdict(plan)])]
    environment = os.environ | dict.fromkeys(THREADS, "1")
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Row.from_plain(json.loads(done.stdout.strip().splitlines()[-1]))


def report(rows: list[Row], command: str) -> list[str]:
    """The tables, in Markdown."""
    systems = [system for system in PACKAGES if any(row.system == system for row in rows)]
    versions = ", ".join(f"{PACKAGES[each]} {importlib.metadata.version(PACKAGES[each])}" for each in systems)
    lines = [
        "# Training: environment steps a second, end to end, in one process of one thread",
        "",
        f"`{command}`, Python {platform.python_version()},",
        f"{versions}, {platform.machine()} with {os.cpu_count()} cores.",
        "Steps for each second of the processor, in brackets for each second of the clock; medians. Settings are",
        "Shoal's defaults for all, but for those in the command. rlox steps a CartPole of its own, in Rust. Returns",
        "are of 20 greedy episodes, by seed. Other work on the machine slows PyTorch more than it slows NumPy: where",
        "figures in brackets are much smaller than those before them, the ratios are larger than on an idle machine.",
        "",
        "| " + " | ".join(["task", *systems, *(f"shoal ÷ {each}" for each in systems[1:])]) + " |",
        "|---" * (2 * len(systems)) + "|",
    ]
    for task in dict.fromkeys(row.task for row in rows):
        cells, speeds = [task], []
        for system in systems:
            same = [row for row in rows if (row.task, row.system) == (task, system)]
            if not same:
                cells.append("not run")
                speeds.append(float("nan"))
                continue
            speeds.append(statistics.median(row.env_steps_per_cpu_s for row in same))
            cells.append(f"{speeds[-1]:,.0f} ({statistics.median(row.env_steps_per_s for row in same):,.0f})")
        cells += [f"**{speeds[0] / speed:.1f}**" for speed in speeds[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| task | environment steps | " + " | ".join(f"return, {each}" for each in systems) + " |"]
    lines.append("|---" * (2 + len(systems)) + "|")
    for task, steps in dict.fromkeys((row.task, row.env_steps) for row in rows):
        cells = [task, f"{steps:,}"]
        for system in systems:
            same = [row for row in rows if (row.task, row.env_steps, row.system) == (task, steps, system)]
            cells.append(
                ", ".join(f"{row.mean_return:.0f}" for row in sorted(same, key=lambda row: row.seed)) or "not run"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the tables; keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--systems", default=",".join(PACKAGES))
    parser.add_argument("--steps", type=int, default=59_392, help="that are timed; whole epochs")
    parser.add_argument("--batch", type=int, default=2048, help="steps of an epoch")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of Shoal's, for all"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file of rows, to which these are added")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        system, plan = json.loads(options.one)
        print(json.dumps(measure(system, Plan(**plan)).to_plain()))
        return
    settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in options.set)}
    held = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    rows = [Row.from_plain(plain) for plain in held]
    systems = [each for each in options.systems.split(",") if importlib.util.find_spec(MODULES[each])]
    if left_out := set(options.systems.split(",")) - set(systems):
        print(f"left out, as not installed: {', '.join(sorted(left_out))}; pip install 'shoal[peers]'", file=sys.stderr)
    for task_name in filter(None, options.tasks.split(",")):
        for seed in range(options.seeds):
            for system in systems:
                if system == "rlox" and is_atari(task_name.removeprefix("gym:")):
                    continue
                rows.append(measured_apart(system, Plan(task_name, seed, options.steps, options.batch, settings)))
                print(rows[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps([row.to_plain() for row in rows], indent=1) + "\n")
    chosen = "".join(f" --set {word}" for word in options.set)
    command = f"--steps {options.steps} --batch {options.batch} --seeds {options.seeds}{chosen}"
    lines = report(rows, f"python benchmarks/training.py {command}")
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
