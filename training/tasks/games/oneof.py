"""Several games as one: ``OneOf(spread=…, foraging=…)``. A scenario says which, by ``params["game"]``.

Roles keep apart, ``spread/agent_0``, since they may see and act in other ways; a cast may give all of them to one
policy that copes with that.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.tasks.play import BadScenarioError, End, Game, Play
from shoal.training.tasks.source import Scenario


class OneOf:
    """Games by name; where a scenario names none, each is as likely.

    Raises:
        UsageError: if there is no game.
    """

    def __init__(self, **games: Game) -> None:
        if not games:
            raise UsageError("one of no games cannot be played; name one")
        self.games = games
        self.name = f"one of {', '.join(games)}"
        self.roles = {f"{name}/{role}": spaces for name, game in games.items() for role, spaces in game.roles.items()}

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One play of one of them."""
        chosen = scenario.params.get("game")
        if chosen is None:
            chosen = list(self.games)[int(rng.integers(len(self.games)))]
        if not isinstance(chosen, str) or chosen not in self.games:
            raise BadScenarioError(f"{chosen!r:.80} is not {self.name}")
        with closing(self.games[chosen].play(scenario, rng)) as inner:
            asks = next(inner)
            while True:
                acts = yield tuple(replace(ask, role=f"{chosen}/{ask.role}") for ask in asks)
                try:
                    asks = inner.send(acts)
                except StopIteration as stop:
                    end: End = stop.value
                    rewards = {f"{chosen}/{role}": reward for role, reward in end.rewards.items()}
                    cut = {f"{chosen}/{role}": sight for role, sight in end.cut.items()}
                    return replace(end, rewards=rewards, cut=cut)
