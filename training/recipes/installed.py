"""Recipes by name, as a task and an algorithm that a manifest can say: ``recipe:rlccf``, learned by ``recipe``.

A recipe is found through the ``shoal.recipes`` entry points. The manifest's hyperparameters are what it overrides.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import PeerId
from shoal.training.manifest import RECIPE_SCHEME, Evaluators, Manifest
from shoal.training.plugins import load_plugin
from shoal.training.recipes.overriding import overridden
from shoal.training.recipes.recipe import Recipe
from shoal.training.tasks import ActionSpace, Box, Discrete, Task, VectorEnv
from shoal.training.tasks.failures import Failures

if TYPE_CHECKING:
    from shoal.training.recipes.learner import RecipeLearner

GROUP: Final = "shoal.recipes"
_ENGINE_VERSION: Final = 2
"""Raised when the same recipe would lead to something else because of what all recipes share."""


def recipe_names() -> list[str]:
    """Of all that are installed."""
    return sorted(entry_points(group=GROUP).names)


def load_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        UsageError: if nobody offers it, or what it needs is not installed.
    """
    recipe = load_plugin(GROUP, "recipe", name)
    if not isinstance(recipe, Recipe):
        raise UsageError(f"what is installed as the recipe {name!r} is none; its package has to offer a Recipe")
    return recipe


class RecipeTask:
    """A recipe, as a task: ``recipe:NAME``."""

    observation_space = Box(1)
    action_space: ActionSpace = Discrete(1)
    target_return: float | None = None

    def __init__(self, name: str) -> None:
        self.recipe = load_recipe(name)
        self.name = f"{RECIPE_SCHEME}:{name}"
        self.version = 1000 * _ENGINE_VERSION + self.recipe.version
        self.failures = Failures(self.name)

    @staticmethod
    def listed() -> list[dict[str, Any]]:
        """All recipes; see `shoal.training.tasks.catalogue`."""
        return [{"name": f"{RECIPE_SCHEME}:{name}", "summary": load_recipe(name).summary} for name in recipe_names()]

    def described(self) -> dict[str, Any]:
        """What there is to tell of one; see `shoal.training.tasks.catalogue`."""
        summary = f"{self.recipe.summary}; see `shoal recipe show {self.recipe.name}`"
        shown, acted = {"seen_as": "what its roles are shown"}, {"acts_by": "what its roles may do"}
        return {"summary": summary, "about": self.recipe.claim, "observation": shown, "action": acted}

    def make(self, num_envs: int) -> VectorEnv:
        """There are none.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.name} is played, not stepped: learn it by --algorithm {RECIPE_SCHEME}")

    @property
    def run_defaults(self) -> dict[str, Any]:
        """Of a manifest's fields."""
        recipe = self.recipe
        return {
            "mode": str(recipe.mode),
            "batch_per_learner": recipe.turns,
            "eval_interval": recipe.eval_interval,
            "evaluators": str(Evaluators.ALL if recipe.is_by_all else Evaluators.ONE),
        }


class RecipeAlgorithm:
    """How recipes are learned: ``recipe``."""

    name = RECIPE_SCHEME
    version = 1
    summary = "what a recipe says: games of many roles, text, several policies; see `shoal recipe ls`"
    paper = ""

    def learner(self, manifest: Manifest, task: Task, *, peer: PeerId, life: str = "", part: str = "") -> RecipeLearner:
        """This node's part; see `RecipeLearner`.

        Raises:
            UsageError: if the task is no recipe, or has no such settings.
        """
        if not isinstance(task, RecipeTask):
            raise UsageError(f"{task.name} is no recipe; learn it by another algorithm, such as ppo")
        from shoal.training.recipes.learner import RecipeLearner  # torch, which whoever lists recipes need not load

        recipe = overridden(task.recipe, manifest.hyperparameters)
        return RecipeLearner(recipe, manifest, task.failures, peer=peer, life=life, part=part)
