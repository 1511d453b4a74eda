"""Does PPO reach what others published, at their settings? Returns after 100 k, 500 k and 1 M steps of one process.

Each row of `PUBLISHED` is a task with the settings of a known implementation and the figure that it reports:
CleanRL's `ppo.py` and `ppo_continuous_action.py`, and the tuned settings of RL Baselines3 Zoo. ``default`` is Shoal
with nothing set. A figure of CleanRL's is the mean of training episodes at the end, one of the Zoo's is of greedy
(deterministic) episodes; both are told here: ``greedy`` over 20 episodes, ``training`` over the last 100 that ended.

``--peers N``: N learners, each with an N-th of the samples of an epoch, that average in mode ``local`` after each, so
that they take as many steps in all as one does. They are learners in one process, without a network between them.
``--systems shoal,sb3``: Stable-Baselines3 learns at the same settings beside it.

    python benchmarks/published.py [--only cartpole-cleanrl,hopper-cleanrl] [--systems shoal] [--peers 1] [--seeds 5]
        [--json FILE] [--keep]

``--json`` keeps rows, and those that it holds already are not run again: a long run can be broken off and taken up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from peers.notes import kept_notes
from peers.sb3 import ppo

RESULT: Final = Path(__file__).parent / "results" / "published.md"
NOTES: Final = "## What is not there"
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
MARKS: Final = (100_000, 300_000, 500_000, 1_000_000)
EPISODES: Final = 20
LAST: Final = 100
HELD_OUT: Final = 1_000_003


@dataclass(frozen=True, slots=True)
class Published:
    """A task, how it is learned, and what others say comes of it.

    Attributes:
        task: Shoal's name of it.
        steps: of the environments, in all.
        batch: steps of an epoch.
        settings: PPO's, over Shoal's defaults.
        figure: what is published, with its spread where that is known; empty: none.
        is_greedy: whether the figure is of greedy episodes, and not of those that were trained on.
    """

    task: str
    steps: int
    batch: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    figure: str = ""
    is_greedy: bool = True


# github.com/vwxyzjn/cleanrl: of both files.
_CLEANRL: Final[dict[str, Any]] = {
    "anneal_learning_rate": True,
    "value_clip_range": 0.2,
    "normalize_advantages": "minibatch",
}
# ppo.py: four environments of 128 steps.
_DISCRETE: Final[dict[str, Any]] = _CLEANRL | {
    "learning_rate": 2.5e-4,
    "update_epochs": 4,
    "num_minibatches": 4,
    "normalize_returns": False,
}
# ppo_continuous_action.py: one environment of 2048 steps.
_CONTINUOUS: Final[dict[str, Any]] = _CLEANRL | {
    "learning_rate": 3e-4,
    "num_envs": 1,
    "update_epochs": 10,
    "num_minibatches": 32,
    "entropy_coefficient": 0.0,
    "normalize_observations": True,
    "normalize_returns": True,
    "initial_log_std": 0.0,
}
# github.com/DLR-RM/rl-baselines3-zoo, hyperparams/ppo.yml, and Stable-Baselines3's own defaults below them. It does not
# halve the value loss, as Shoal and CleanRL do.
_ZOO: Final[dict[str, Any]] = {
    "learning_rate": 3e-4,
    "normalize_advantages": "minibatch",
    "normalize_observations": False,
    "normalize_returns": False,
    "value_coefficient": 1.0,
    "entropy_coefficient": 0.0,
}

PUBLISHED: Final[dict[str, Published]] = {
    "cartpole-cleanrl": Published("gym:CartPole-v1", 500_000, 512, _DISCRETE, "490 ± 6", is_greedy=False),
    "cartpole-zoo": Published(
        "gym:CartPole-v1",
        100_000,
        256,
        _ZOO
        | {"num_envs": 8, "num_minibatches": 1, "gae_lambda": 0.8, "gamma": 0.98, "update_epochs": 20}
        | {"learning_rate": 1e-3, "anneal_learning_rate": True, "anneal_clip_range": True},
        "500",
    ),
    "acrobot-cleanrl": Published("gym:Acrobot-v1", 500_000, 512, _DISCRETE, "-86 ± 1", is_greedy=False),
    "acrobot-zoo": Published(
        "gym:Acrobot-v1",
        1_000_000,
        4096,
        _ZOO
        | {"num_envs": 16, "num_minibatches": 64, "gae_lambda": 0.94, "update_epochs": 4}
        | {"normalize_observations": True, "normalize_returns": True},
        "-73.5",
    ),
    "lunarlander-zoo": Published(
        "gym:LunarLander-v3",
        1_000_000,
        16384,
        _ZOO
        | {"num_envs": 16, "num_minibatches": 256, "gae_lambda": 0.98, "gamma": 0.999, "update_epochs": 4}
        | {"entropy_coefficient": 0.01},
        "242 ± 32 (v2)",
    ),
    "hopper-cleanrl": Published("gym:Hopper-v5", 1_000_000, 2048, _CONTINUOUS, "2,383 ± 272 (v2)", is_greedy=False),
    "halfcheetah-cleanrl": Published(
        "gym:HalfCheetah-v5", 1_000_000, 2048, _CONTINUOUS, "1,443 ± 46 (v2)", is_greedy=False
    ),
    "cartpole-default": Published("gym:CartPole-v1", 100_000, 2048),
    "acrobot-default": Published("gym:Acrobot-v1", 300_000, 2048),
    "pendulum-default": Published("gym:Pendulum-v1", 300_000, 2048),
    "lunarlander-default": Published("gym:LunarLander-v3", 300_000, 2048, figure="183 @ 300 k (SLM-Lab)"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        greedy: mean returns of `EPISODES` greedy episodes, by the mark at which they were played.
        training: likewise of the last episodes that were trained on.
    """

    name: str
    system: str
    peers: int
    seed: int
    greedy: dict[str, float]
    training: dict[str, float]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.name, self.system, self.peers, self.seed


def marks(published: Published) -> list[int]:
    """When it is looked at, in environment steps."""
    return sorted({mark for mark in MARKS if mark < published.steps} | {published.steps})


def shoal(name: str, peers: int, seed: int) -> Row:
    """Learners that average what they have after every epoch; one is alone with its own."""
    from shoal.protocol.ids import PeerId
    from shoal.training.algorithms.local import update_together
    from shoal.training.algorithms.ppo import PPO
    from shoal.training.manifest import Manifest
    from shoal.training.tasks import load_task

    published = PUBLISHED[name]
    task = load_task(published.task)
    ids = [PeerId.of_public_key(bytes([index]) * 32) for index in range(peers)]
    manifest = Manifest(
        owner=ids[0],
        task=published.task,
        algorithm="ppo",
        seed=seed,
        batch_size=published.batch,
        max_env_steps=published.steps,
        hyperparameters=dict(published.settings),
    )
    learners = {each: PPO().learner(manifest, task, peer=each) for each in ids}
    taken, row, last = 0, Row(name, "shoal", peers, seed, {}, {}), deque[float](maxlen=LAST)
    for mark in marks(published):
        while taken < mark:
            for learner in learners.values():
                collected = learner.collect(published.batch // peers)
                taken += collected.samples
                last.extend(collected.episode_returns)
            update_together(learners)
        row.greedy[str(mark)] = statistics.fmean(learners[ids[0]].evaluate(EPISODES, seed + HELD_OUT))
        row.training[str(mark)] = statistics.fmean(last) if last else float("nan")
    return row


def sb3(name: str, peers: int, seed: int) -> Row:
    """Stable-Baselines3 at the same settings."""
    import gymnasium
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    from shoal.protocol.ids import PeerId
    from shoal.training.algorithms import load_algorithm
    from shoal.training.manifest import Manifest
    from shoal.training.tasks import load_task

    assert peers == 1, "Stable-Baselines3 is one process"
    published = PUBLISHED[name]
    owner = PeerId.of_public_key(bytes(32))
    manifest = Manifest(owner=owner, task=published.task, algorithm="ppo", hyperparameters=dict(published.settings))
    config = load_algorithm("ppo").configured(manifest, load_task(published.task))

    def make() -> Any:
        return gymnasium.make(published.task.removeprefix("gym:"))

    model, envs = ppo(config, make, published.batch, seed)
    # A schedule falls over all the steps, so the run is one, and is looked at from within.
    row, left = Row(name, "sb3", 1, seed, {}, {}), marks(published)

    def look(steps: int) -> None:
        while left and steps >= left[0]:
            mark = str(left.pop(0))
            held_out = VecNormalize(
                make_vec_env(make, 1, seed=seed + HELD_OUT),
                norm_obs=config.normalize_observations,
                norm_reward=False,
                training=False,
            )
            if config.normalize_observations:
                held_out.obs_rms = envs.obs_rms
            row.greedy[mark] = float(evaluate_policy(model, held_out, EPISODES, deterministic=True)[0])
            row.training[mark] = statistics.fmean(each["r"] for each in model.ep_info_buffer)

    def watch(local: Mapping[str, Any], _global: Mapping[str, Any]) -> bool:
        look(local["self"].num_timesteps)
        return True

    model.learn(published.steps, callback=watch)
    look(published.steps)
    return row


def ran(name: str, system: str, peers: int, seed: int) -> Row:
    """One run, in a process of its own with one thread."""
    words = [sys.executable, __file__, "--one", json.dumps([name, system, peers, seed])]
    environment = os.environ | dict.fromkeys(THREADS, "1")
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.fmean(values):,.1f}"
    return f"{mean} ± {statistics.stdev(values):,.1f}" if len(values) > 1 else mean


def report(rows: list[Row]) -> list[str]:
    """The tables, in Markdown."""
    systems = {"shoal": "shoal", "sb3": "stable-baselines3"}
    used = [each for each in systems if any(row.system == each for row in rows)]
    versions = ", ".join(f"{systems[each]} {importlib.metadata.version(systems[each])}" for each in used)
    lines = [
        "# Published: the returns that PPO reaches at the settings of others, and at none",
        "",
        f"`python benchmarks/published.py`, Python {platform.python_version()},",
        f"{versions}, gymnasium {importlib.metadata.version('gymnasium')}, {platform.machine()}.",
        "Mean ± standard deviation over seeds. What is to be held against the published figure is in bold: greedy",
        f"episodes ({EPISODES}), or the last {LAST} that were trained on. `-cleanrl`, `-zoo`: whose settings;",
        "`-default`: nothing is set. Published figures of `v2` are of other physics than those that run today.",
        "",
        "| run | system | peers | seeds | steps | greedy | training | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, published in PUBLISHED.items():
        for system, peers in dict.fromkeys((row.system, row.peers) for row in rows if row.name == name):
            same = [row for row in rows if (row.name, row.system, row.peers) == (name, system, peers)]
            for mark in marks(published):
                is_last = mark == published.steps
                greedy, training = (
                    spread([getattr(row, kind)[str(mark)] for row in same]) for kind in ("greedy", "training")
                )
                if is_last and published.is_greedy:
                    greedy = f"**{greedy}**"
                elif is_last:
                    training = f"**{training}**"
                figure = published.figure if is_last else ""
                lines.append(
                    f"| {name} | {system} | {peers} | {len(same)} | {mark:,} | {greedy} | {training} | {figure} |"
                )
    lines += ["", "Greedy at the end, by seed:", ""]
    for name, system, peers in dict.fromkeys((row.name, row.system, row.peers) for row in rows):
        same = sorted((row for row in rows if row.key[:3] == (name, system, peers)), key=lambda row: row.seed)
        last = str(PUBLISHED[name].steps)
        lines.append(f"- {name}, {system}, {peers}: " + ", ".join(f"{row.greedy[last]:,.0f}" for row in same))
    return lines


def main() -> None:
    """Print the tables; keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PUBLISHED))
    parser.add_argument("--systems", default="shoal")
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file of rows; those that it holds are not run again")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, system, peers, seed = json.loads(options.one)
        print(json.dumps(asdict({"shoal": shoal, "sb3": sb3}[system](name, peers, seed))))
        return
    held = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    rows = [Row(**plain) for plain in held]
    for name in filter(None, options.only.split(",")):
        for seed in range(options.seeds):
            for system in options.systems.split(","):
                if (name, system, options.peers, seed) in {row.key for row in rows}:
                    continue
                rows.append(ran(name, system, options.peers, seed))
                print(rows[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    lines = report(rows)
    print("\n".join(lines))
    if options.keep:
        RESULT.write_text("\n".join(lines) + "\n\n" + (kept_notes(RESULT, NOTES) or f"{NOTES}\n"))


if __name__ == "__main__":
    main()
