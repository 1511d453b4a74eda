"""What `shoal new` writes: packages that run, and are tested, as they are. NAME and ENV_ID are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_PYPROJECT: Final = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "NAME"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = [NEEDS]

# By this Shoal finds the KIND: its name, and where it is.
[project.entry-points."shoal.GROUP"]
ENTRY

[tool.setuptools]
packages = ["NAME"]
"""


def _pyproject(kind: str, group: str, entry: str, needs: str) -> str:
    words = {"KIND": kind, "GROUP": group, "ENTRY": entry, "NEEDS": needs}
    text = _PYPROJECT
    for word, value in words.items():
        text = text.replace(word, value)
    return text


TASK: Final[Mapping[str, str]] = {
    "pyproject.toml": _pyproject(
        "environment", "environments", '"ENV_ID" = "NAME:register"', '"gymnasium>=1.0", "numpy>=2.0"'
    ),
    "README.md": """# NAME

An environment of your own, learned together by Shoal.

    pip install -e .                      # on every member: code never travels
    shoal task show gym:ENV_ID
    shoal swarm create --task gym:ENV_ID --env-set length=7
    pip install pytest && pytest          # what it promises, without a swarm

Others install the same package and `shoal join TICKET`. Raise the version in the id (`-v1`) whenever the environment
shows, rewards or ends otherwise than before: members must agree.
""",
    "NAME/__init__.py": '''"""ENV_ID: walk to the end of a corridor. Replace it by what you want to be learned."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


def register() -> None:
    """Put the environment into Gymnasium's registry."""
    gymnasium.register("ENV_ID", entry_point="NAME:Corridor", max_episode_steps=50, reward_threshold=0.8)


class Corridor(gymnasium.Env[Any, Any]):
    """Step left or right until the right end is reached; each step costs a little.

    Args:
        length: fields; ``--env-set length=9`` makes it longer on every member.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, length: int = 5, render_mode: str | None = None) -> None:
        self.length, self.render_mode, self.place = length, render_mode, 0
        self.observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(0, self.length - 1))
        return self._shown(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = min(max(self.place + (1 if action else -1), 0), self.length - 1)
        is_there = self.place == self.length - 1
        return self._shown(), 1.0 if is_there else -0.02, is_there, False, {}

    def render(self) -> Any:
        """The corridor from above, ``[10, 10 * length, 3]``; for `shoal play --out`."""
        picture = np.full((10, 10 * self.length, 3), 240, np.uint8)
        picture[:, -10:] = (120, 200, 120)
        picture[2:8, 10 * self.place + 2 : 10 * self.place + 8] = (40, 60, 200)
        return picture

    def _shown(self) -> Any:
        return np.array([self.place / (self.length - 1), 1 / self.length], np.float32)
''',
    "tests/test_NAME.py": '''"""It keeps Gymnasium's rules, and Shoal can learn it."""

import gymnasium
from gymnasium.utils.env_checker import check_env

import NAME
from shoal.training.tasks import load_task


NAME.register()


def test_it_is_an_environment() -> None:
    check_env(gymnasium.make("ENV_ID").unwrapped)


def test_it_is_a_task_of_shoals() -> None:
    task = load_task("gym:ENV_ID", {"length": 7})
    task.try_out(0)
    assert task.target_return == 0.8
''',
}

ALGORITHM: Final[Mapping[str, str]] = {
    "pyproject.toml": _pyproject("algorithm", "algorithms", 'NAME = "NAME:Weighted"', '"shoal[train]"'),
    "README.md": """# NAME

A way to learn of your own, for Shoal.

    pip install -e .                      # on every member: code never travels
    shoal algorithm show NAME
    shoal swarm create --task gym:CartPole-v1 --algorithm NAME --set temperature=0.5
    pip install pytest && pytest          # it learns, in one process and without a swarm

Others install the same package and `shoal join TICKET`. Raise `version` whenever the same run would lead to something
else: members must agree.
""",
    "NAME/__init__.py": '''"""NAME: what turned out better than expected becomes likelier. Replace the loss by yours.

Advantage-weighted regression (Peng et al., arXiv 1910.00177): each action counts by exp(A / temperature), at most
``max_weight``, with A its advantage of mean 0 and deviation 1 over the batch of all members.

Deviations: on-policy, so samples are those of the last epoch alone; the critic is trained beside the actor, and
advantages are GAE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shoal.training.algorithms.engine import OnEngine
from shoal.training.algorithms.on_policy import Batch, OnPolicy, OnPolicySettings, actor_critic
from shoal.training.algorithms.policy_gradient import PolicyGradientLoss
from shoal.training.algorithms.settings import setting
from shoal.training.exchange.averager import Moments
from shoal.training.manifest import Manifest
from shoal.training.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSettings(OnPolicySettings):
    """What can be set: a default, a line for people, and the range; beside what all algorithms have."""

    temperature: float = setting(0.5, "lower ones follow the best actions alone", 1e-3, 1e3)
    max_weight: float = setting(5.0, "of one action", 1.0, 1e6)


class Weighted(OnEngine[WeightedSettings]):
    """The algorithm called ``NAME``. The engine collects, steps by Adam, and exchanges, in every mode."""

    name = "NAME"
    version = 1
    summary = "actions count by how much better they were than expected"
    paper = "https://arxiv.org/abs/1910.00177"
    settings = WeightedSettings

    def objective(self, settings: WeightedSettings, manifest: Manifest, task: Task) -> WeightedObjective:
        """A learner's own: the networks, and the loss on them."""
        return WeightedObjective(settings, actor_critic(settings, manifest, task))


class WeightedObjective(OnPolicy[WeightedSettings]):
    """What is made of samples, and the loss."""

    def with_moments(self, batch: Batch, moments: Moments) -> Batch:
        """Weights in place of advantages, given those' mean and deviation over all members' samples."""
        advantages = batch.normalized(moments).advantages / np.float32(self.settings.temperature)
        with np.errstate(over="ignore"):
            weights = np.minimum(np.exp(advantages), np.float32(self.settings.max_weight))
        return replace(batch, advantages=weights)

    def make_loss(self, size: int) -> PolicyGradientLoss:
        """- weight log p, the squared error of the value, and an entropy bonus, on minibatches of one size."""
        return PolicyGradientLoss(self.model, self.settings, size)
''',
    "tests/test_NAME.py": '''"""It learns, in one process and without a swarm."""

from statistics import fmean

from NAME import Weighted
from shoal.training.algorithms.local import learn_locally


def test_it_learns() -> None:
    first, *_, last = learn_locally(Weighted(), "gym:CartPole-v1", 8, batch=1024)
    assert fmean(last) > 2 * fmean(first)
''',
}

RECIPE: Final[Mapping[str, str]] = {
    "pyproject.toml": _pyproject("recipe", "recipes", 'NAME = "NAME:RECIPE"', '"shoal[train]"'),
    "README.md": """# NAME

A way of learning together of your own, for Shoal: a game, who plays it, and what is held to be so.

    pip install -e .                      # on every member: code never travels
    shoal recipe show NAME
    shoal recipe run NAME --peers 3       # real nodes on this machine, against the baseline: does the claim hold?
    shoal swarm create --task recipe:NAME --algorithm recipe
    pip install pytest && pytest          # the same in one process

Others install the same package and `shoal join TICKET`. Raise `version` whenever the same run would lead to something
else: members must agree.
""",
    "NAME/__init__.py": '''"""NAME: two learn words of their own for what only one of them sees. Replace it by yours.

A signalling game (Lewis, Convention, 1969): a speaker sees one of some things and says one of as many words; a listener
hears it and points at a thing. Both earn 1 if it is the right one. Nobody tells them what words mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.training.recipes.recipe import Policy, Probe, Recipe, Report, Verdict
from shoal.training.tasks.base import Box, Discrete
from shoal.training.tasks.cast import ByRole
from shoal.training.tasks.play import Ask, End, Play, Role
from shoal.training.tasks.source import FreshSeeds, Scenario, SharedPrompts


@dataclass(frozen=True)
class Signals:
    """The game. What is a number or a truth here, ``--set game.things=4`` changes.

    Attributes:
        things: to be named, and words.
        is_mute: whether words are not heard.
    """

    things: int = 3
    is_mute: bool = False
    name: str = "signals"

    @property
    def roles(self) -> Mapping[str, Role]:
        """What each sees, and how it acts."""
        role = Role(Box(self.things), Discrete(self.things))
        return {"speaker": role, "listener": role}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play: a generator that asks roles, and is sent what they do. Chance is the scenario's alone."""
        things = np.eye(self.things, dtype=np.float32)
        thing = int(np.random.default_rng(scenario.seed).integers(self.things))
        (word,) = yield (Ask("speaker", things[thing]),)
        heard = np.zeros(self.things, np.float32) if self.is_mute else things[int(word)]
        (pointed,) = yield (Ask("listener", heard),)
        earned = float(int(pointed) == thing)
        return End({"speaker": earned, "listener": earned})


def judge(run: Report, mute: Report) -> Verdict:
    """They understand each other, and do not where nothing is heard."""
    heard, unheard = (each.last("return", of=2) for each in (run, mute))
    text = f"{heard:.0%} of what was meant was understood, and {unheard:.0%} where nothing was heard; the bar is 80 %"
    return Verdict(heard >= 0.8 and heard > unheard, heard, unheard, text)


_POLICY: Final = Policy(
    model="mlp",
    sizes={"hidden_sizes": (32, 32)},
    objective="ppo",
    settings={"learning_rate": 3e-3, "entropy_coefficient": 0.02, "num_minibatches": 4},
)

RECIPE: Final = Recipe(
    name="NAME",
    summary="two learn words of their own for what only one of them sees",
    paper="Lewis, Convention, 1969",
    claim="speakers and listeners that are averaged over the nodes come to understand each other",
    game=Signals(),
    source=FreshSeeds(),
    cast=ByRole(speaker="speaker", listener="listener"),
    policies={"speaker": _POLICY, "listener": _POLICY},
    probes=(Probe("return", SharedPrompts(64, seed=1, is_fixed=True)),),
    verdict=judge,
    baseline={"game.is_mute": True},
    epochs=20,
    turns=512,
    plays=64,
)
''',
    "tests/test_NAME.py": '''"""Two nodes in one process, without a network: the claim holds."""

from NAME import RECIPE

from shoal.training.recipes.local import play_locally
from shoal.training.recipes.overriding import overridden


def test_its_claim_holds() -> None:
    run = play_locally(RECIPE, 2)
    mute = play_locally(overridden(RECIPE, RECIPE.baseline), 2, epochs=5)
    verdict = RECIPE.verdict(run, mute)
    assert verdict.holds, verdict.text
''',
}
