"""OpenSpiel's games (https://openspiel.readthedocs.io, arXiv 1908.09453) as games: ``OpenSpielGame("kuhn_poker")``.

Players take turns, or all act at once where the game says so; chance is drawn from the play's own generator. Sights are
the information state where the game gives one as numbers, else its observation. Rewards are what a player's returns
changed by since its last act. Only what `TABLE` names is made, and of it only games whose chance is out in the open:
one that draws for itself could not be replayed.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from shoal.protocol.errors import UsageError
from shoal.training.plugins import suggest
from shoal.training.tasks.base import Discrete, Floats
from shoal.training.tasks.games.needs import needed
from shoal.training.tasks.play import Ask, Box, End, Play, Role
from shoal.training.tasks.source import Scenario

TABLE: Final = frozenset(
    (
        *("backgammon", "blotto", "breakthrough", "catch", "connect_four", "dots_and_boxes", "first_sealed_auction"),
        *("goofspiel", "hanabi", "hex", "kuhn_poker", "laser_tag", "leduc_poker", "liars_dice", "markov_soccer"),
        *("matrix_coordination", "matrix_pd", "matrix_rps", "matrix_sh", "nim", "oshi_zumo", "othello", "pig"),
        *("tic_tac_toe", "tiny_bridge_2p", "tiny_hanabi"),
    )
)


class OpenSpielGame:
    """One game of OpenSpiel, with roles ``player_0``, ``player_1``, ….

    Raises:
        UsageError: if the table does not name it, or OpenSpiel is not installed.
    """

    def __init__(self, name: str, **parameters: int | float | bool | str) -> None:
        """Load it; ``parameters`` are the game's own, such as ``players=3``."""
        if name not in TABLE:
            raise UsageError(f"no OpenSpiel game is called {name!r:.80} here; {suggest(name, TABLE)}")
        pyspiel = needed("pyspiel", f"openspiel:{name}")
        self.name = f"openspiel:{name}"
        try:
            self._game = pyspiel.load_game(name, parameters)
        except pyspiel.SpielError as error:
            raise UsageError(f"{self.name} does not take {parameters}: {' '.join(str(error).split())[:300]}") from error
        kind = self._game.get_type()
        self._knows = kind.provides_information_state_tensor
        shape = self._game.information_state_tensor_shape() if self._knows else self._game.observation_tensor_shape()
        role = Role(Box(int(np.prod(shape))), Discrete(self._game.num_distinct_actions()))
        self._players = [f"player_{number}" for number in range(self._game.num_players())]
        self.roles = dict.fromkeys(self._players, role)

    def play(self, scenario: Scenario, rng: np.random.Generator) -> Play:
        """One game, from its start to its end."""
        state = self._game.new_initial_state()
        paid = [0.0] * len(self._players)

        def ask(player: int) -> Ask:
            total = state.player_return(player)
            reward, paid[player] = total - paid[player], total
            legal = np.array(state.legal_actions_mask(player), np.bool_)
            return Ask(self._players[player], self._sight(state, player), reward, legal)

        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, shares = zip(*state.chance_outcomes(), strict=True)
                drawn = int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side="right"))
                state.apply_action(outcomes[min(drawn, len(outcomes) - 1)])
            elif state.is_simultaneous_node():
                able = [player for player in range(len(paid)) if state.legal_actions(player)]
                acts = dict(zip(able, (yield tuple(map(ask, able))), strict=True))
                state.apply_actions([acts.get(player, 0) for player in range(len(paid))])
            else:
                (act,) = yield (ask(state.current_player()),)
                state.apply_action(act)
        returns = state.returns()
        return End({name: returns[player] - paid[player] for player, name in enumerate(self._players)})

    def _sight(self, state: Any, player: int) -> Floats:
        numbers = state.information_state_tensor(player) if self._knows else state.observation_tensor(player)
        return np.array(numbers, np.float32)
