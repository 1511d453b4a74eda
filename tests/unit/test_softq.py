"""Soft Q from demonstrations: the loss as by hand, a policy that is found again, and posts that are no plays."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId
from shoal.training.algorithms.grpo import GRPO, GroupCorrection, GRPOSettings
from shoal.training.algorithms.softq import SoftQ, SoftQBatch, SoftQSettings
from shoal.training.algorithms.takes import Trainee
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import Mode
from shoal.training.models.mlp import MLP
from shoal.training.recipes.local import play_locally
from shoal.training.recipes.mamql import RECIPE
from shoal.training.recipes.overriding import overridden
from shoal.training.tasks.cast import Everyone, Learned, Scripted
from shoal.training.tasks.games.handover import Carrier, Handover
from shoal.training.tasks.play import Box, Discrete, Role, Take
from shoal.training.tasks.shown import read_shown, show
from shoal.training.tasks.source import News, Posted, Scenario, SharedPrompts
from shoal.training.tasks.stage import Stage, alone

TWO = Role(Box(3), Discrete(2))


def walk(states: list[int], acts: list[int], number: int = 0, *, proven: bool = False) -> Take:
    """A take through states that are shown as ones and zeros; it ends."""
    take = Take("body", TWO, Learned("a"), Scenario(number), number, proven=proven)
    take.sights = [np.eye(3, dtype=np.float32)[state] for state in states]
    take.acts, take.rewards = list(acts), [0.0] * len(acts)
    take.log_probs = [math.nan] * len(acts)
    return take


def test_the_loss_is_what_it_is_by_hand() -> None:
    """All logits 0: V is τ log 2 wherever a play goes on, and Q is 0."""
    model = MLP([TWO], hidden_sizes=(4,))
    model.flat[:] = 0
    objective = SoftQ(SoftQSettings(gamma=0.5, temperature=2.0, bound=0.5))
    batch = SoftQBatch(objective.steps(model, [walk([0, 1], [1, 0])]), None)
    loss, _ = objective.loss(model, batch)
    value = 2 * math.log(2)
    rewards = np.array([-0.5 * value, 0.0])
    wanted = -rewards.mean() + np.mean([value - 0.5 * value, value]) + np.square(rewards).mean() / 2
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_policy_of_who_showed_it_is_found_again() -> None:
    """Three states in a ring; another act in each."""
    rings = [[(start + step) % 3 for step in range(3)] for start in range(3)]
    takes = [walk(states, [state % 2 for state in states], states[0]) for states in rings]
    model = MLP([TWO], hidden_sizes=(16,))
    settings = SoftQSettings(learning_rate=0.01, update_epochs=30, num_minibatches=1)
    trainee = Trainee(model, SoftQ(settings), mode=Mode.LOCAL, codec=Codec.FP32, seed=0, is_own=True)
    for _ in range(5):
        with pytest.raises(StopIteration):
            next(trainee.update(takes, News()))
    turns = model.encode([walk([0, 1, 2], [0, 1, 0])])
    assert float(model.log_probs(turns).exp().min().detach()) > 0.9


def test_own_turns_of_an_update_that_failed_teach_nobody() -> None:
    """What was kept before stays, as many updates of it as are asked for."""
    trainee = Trainee(
        MLP([TWO], hidden_sizes=(4,)),
        SoftQ(SoftQSettings(kept=2)),
        mode=Mode.LOCAL,
        codec=Codec.FP32,
        seed=0,
        is_own=True,
    )
    news, shown = News(0, 0), walk([0, 1], [0, 1], 9)

    def own_turns(number: int) -> int:
        batch = next_batch(trainee, [shown, walk([0, 1, 2], [0, 0, 0], number, proven=True)], news)
        return 0 if batch.own is None else len(batch.own)

    assert own_turns(0) == 3
    assert own_turns(1) == 3  # the first was never said to be done
    trainee.used()
    assert own_turns(2) == 6
    trainee.used()
    trainee.used()
    assert own_turns(3) == 6  # of two updates, the newest among them


def next_batch(trainee: Trainee, takes: list[Take], news: News) -> SoftQBatch:
    """What an update would be made from; it goes no further."""
    objective = trainee.objective
    assert isinstance(objective, SoftQ)
    with pytest.raises(StopIteration) as over:
        next(objective.prepare(takes, trainee.model, news))
    assert isinstance(over.value.value, SoftQBatch)
    return over.value.value


def test_posts_that_are_no_plays_of_the_game_are_passed_over() -> None:
    """What is sound comes back as it was shown."""
    game = Handover(size=3, turns=8)
    stage = Stage(game, SharedPrompts(2), Everyone(Scripted("e")), {Scripted("e"): Carrier(game)}, 2)
    arrays = show(alone(stage.collect(News())).plays, game.roles)
    seats = {role: Learned(role) for role in game.roles}
    post = Posted(PeerId("12D3"), Cid("bafy"), 0, arrays)
    takes = read_shown(post, game.roles, seats)
    assert [(take.role, len(take), take.proven) for take in takes[:2]] == [("agent_0", 8, False)] * 2
    for name, bad in {
        "agent_0/acts": arrays["agent_0/acts"] + 9,
        "agent_0/sights": arrays["agent_0/sights"] * np.float32("nan"),
        "agent_1/lengths": np.array([8, 2**62], np.int64),
        "agent_1/last": arrays["agent_1/last"].astype(np.float64),
        "agent_9/acts": arrays["agent_0/acts"],
    }.items():
        assert read_shown(replace(post, arrays={**arrays, name: bad}), game.roles, seats) == []


def test_grpo_learns_from_bodies() -> None:
    """A row for each act, with its take's advantage."""
    model = MLP([TWO], hidden_sizes=(4,))
    takes = [walk([0, 1], [0, 1]), walk([0], [1])]
    batch = GRPO(GRPOSettings(divide_by_length=True)).batch(takes, np.array([1, 0], np.float32), model)
    assert batch is not None
    assert len(batch.part(np.arange(2))) == 2
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5]
    assert np.isfinite(float(GRPO(GRPOSettings()).loss(model, batch)[0].detach()))
    by_groups = GRPO(GRPOSettings(correction=GroupCorrection.GROUP_EXPECTATION))
    with pytest.raises(UsageError, match="set correction none"):
        by_groups.batch(takes, np.array([1, 0], np.float32), model)


def test_a_short_run_learns_from_what_the_expert_posted() -> None:
    """Three parts, one process."""
    small = overridden(RECIPE, {"game.size": 3, "game.turns": 20, "turns": 160, "plays": 4})
    report = play_locally(small, 3, epochs=6)
    assert report.last("sampled") > report.first("sampled")
