"""Shards of takes: plays of every kind of role come back, are scored again, and their tokens drawn again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.training.models import tokens as tokens_of
from shoal.training.rollouts.checking import check_plays, check_takes, token_noise
from shoal.training.rollouts.evidence import Finding, Lie, Verdict, disproved, hear, say
from shoal.training.rollouts.rows import DoesNotFitError, rows_of
from shoal.training.rollouts.shard import Head, Shard, ShardKind, open_shard, seal
from shoal.training.rollouts.takes import Drawn, Part, PlayOf, columns_of, groups_of, play_of, plays_of
from shoal.training.tasks.base import Discrete
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.games.text import SortDigits, TextTask
from shoal.training.tasks.play import Game, Take
from shoal.training.tasks.playing import Played, difference
from shoal.training.tasks.source import FreshSeeds, News, Scenario
from shoal.training.tasks.stage import Stage, alone

from .plays import KINDS, Echo, Tangle
from .shards import ALICE, BOB, STATE, SWARM, a_shard, a_task

TASK = "a game"
kinds = st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=4)


def a_head(plays: Sequence[PlayOf], number: int = 0) -> Head:
    samples = sum(len(part.take) for play in plays for part in play.parts)
    return Head(
        kind=ShardKind.TAKES,
        swarm=SWARM,
        task=TASK,
        version=2,
        state=STATE,
        stream=number,
        number=0,
        samples=max(samples, 1),
        surroundings=bytes(16),
    )


def sealed(game: Game, plays: Sequence[PlayOf], *, with_sights: bool = False, head: Head | None = None) -> Shard:
    cid, data = seal(ALICE, head or a_head(plays), columns_of(plays, game.roles, with_sights=with_sights))
    return open_shard(data, cid=cid, swarm=SWARM)


def played(game: Game, seed: int, turns: int = 20) -> list[Played]:
    stage = Stage(
        game,
        FreshSeeds(tag="t", params={"level": [1, "é"]}),
        lambda *_: (Learned("all"),),
        {Learned("all"): Echo()},
        plays=3,
        seed=seed,
    )
    return list(alone(stage.collect(News(epoch=2), turns)).plays)


@given(kinds, st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_plays_come_back_as_they_were_played(roles: list[int], seed: int, with_sights: bool) -> None:
    game = Tangle(tuple(roles))
    plays = played(game, seed)
    if not plays:
        return
    shard = sealed(game, [play_of(each) for each in plays], with_sights=with_sights)
    found = plays_of(shard, game.roles)
    assert [each.scenario for each in found] == [each.scenario for each in plays]
    for one, other in zip(found, plays, strict=True):
        assert [part.take.role for part in one.parts] == [take.role for take in other.takes]
        for part, take in zip(one.parts, other.takes, strict=True):
            again = part.take
            assert [_plain(act) for act in again.acts] == [_plain(act) for act in take.acts]
            assert [_plain(sight) for sight in again.sights] == (
                [_plain(x) for x in take.sights] if with_sights else []
            )
            assert np.float32(again.rewards).tobytes() == np.float32(take.rewards).tobytes()
            assert np.float32(again.log_probs).tobytes() == np.float32(take.log_probs).tobytes()
            assert (again.cut, again.proven, again.version) == (take.cut, take.proven, 2)
    checked = check_takes(shard, game, task=TASK)
    assert checked.verdict is Verdict.TRUE, checked
    assert checked.seen == len(plays)


def _plain(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


def test_what_is_drawn_of_a_shard_are_all_plays_of_a_scenario() -> None:
    plays = [play_of(each) for each in played(Tangle(), 4)]
    twice = [plays[0], plays[1], plays[0]]
    assert groups_of(twice) == ((0, 2), (1,))


def test_what_is_replayed_is_what_was_played() -> None:
    game = Tangle()
    plays = played(game, 4)
    found = plays_of(sealed(game, [play_of(each) for each in plays], with_sights=True), game.roles)
    for one, other in zip(found, plays, strict=True):
        for part, take in zip(one.parts, other.takes, strict=True):
            part.take.legal, part.take.early = take.legal, take.early
            part.take.rewards = take.rewards
            assert difference(part.take, take) == ""


def changed(play: PlayOf, change: Callable[[Take], None]) -> PlayOf:
    part = play.parts[0]
    take = part.take
    copy = Take(take.role, take.spaces, take.seat, take.scenario, take.play, take.version, take.proven)
    for name in ("sights", "acts", "log_probs", "rewards"):
        getattr(copy, name).extend(getattr(take, name))
    copy.early, copy.cut, copy.final = take.early, take.cut, take.final
    change(copy)
    return PlayOf(play.scenario, (Part(copy, part.drawn), *play.parts[1:]))


def _reward(take: Take) -> None:
    take.rewards[-1] += 1


def _early(take: Take) -> None:
    take.early += 1


def _cut(take: Take) -> None:
    take.cut = not take.cut


def _longer(take: Take) -> None:
    for name in ("sights", "acts", "log_probs", "rewards"):
        getattr(take, name).append(getattr(take, name)[-1])


def _sight(take: Take) -> None:
    take.sights[0] = take.sights[0] + np.float32(1)


@pytest.mark.parametrize(
    ("change", "lie"),
    [(_reward, Lie.REWARDS), (_early, Lie.REWARDS), (_cut, Lie.ENDS), (_longer, Lie.ACTS), (_sight, Lie.SIGHTS)],
)
def test_a_play_that_was_edited_is_false_where_it_was(change: Callable[[Take], None], lie: Lie) -> None:
    game = Tangle()
    plays = [play_of(each) for each in played(game, 7)]
    number = next(n for n, play in enumerate(plays) if n and play.parts[0].take.role == "role_0")
    plays[number] = changed(plays[number], change)
    found = check_takes(sealed(game, plays, with_sights=True), game, task=TASK)
    assert (found.verdict, found.lie, found.part) == (Verdict.FALSE, lie, number), found


def test_invented_scenarios_are_found_if_it_is_known_what_was_to_be_played() -> None:
    game = Tangle()
    plays = played(game, 7)
    shard = sealed(game, [play_of(each) for each in plays])
    due = [each.scenario for each in plays]
    assert check_takes(shard, game, task=TASK, scenarios=due).verdict is Verdict.TRUE
    other = [*due[:-1], Scenario(1)]
    assert check_takes(shard, game, task=TASK, scenarios=other).lie is Lie.SEEDS


def test_what_cannot_be_told_is_not_called_false() -> None:
    game = Tangle()
    shard = sealed(game, [play_of(each) for each in played(game, 7)])
    assert check_takes(shard, game, task="another").verdict is Verdict.DOES_NOT_FIT
    assert check_takes(a_shard(a_task()), game, task="gym:CartPole-v1").verdict is Verdict.DOES_NOT_FIT
    with pytest.raises(DoesNotFitError):
        rows_of(shard, 3, Discrete(2))

    class Broken(Tangle):
        def play(self, scenario: Scenario, rng: np.random.Generator) -> Any:
            yield from super().play(scenario, rng)
            raise RuntimeError("broken")

    assert check_takes(shard, Broken(), task=TASK).verdict is Verdict.CANNOT_BE_HAD


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_columns_of_a_liar_are_refused_in_words(data: st.DataObject) -> None:
    game = Tangle()
    plays = [play_of(each) for each in played(game, 7)]
    columns = dict(columns_of(plays, game.roles, with_sights=True))
    name = data.draw(st.sampled_from(sorted(columns)))
    array = columns[name].copy()
    if data.draw(st.booleans()) and array.size:
        raw = array.view(np.uint8)
        raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        array = array[: data.draw(st.integers(0, len(array)))]
    columns[name] = array
    cid, raw_data = seal(ALICE, a_head(plays), columns)
    shard = open_shard(raw_data, cid=cid)
    with contextlib.suppress(ProtocolError):  # nothing else is raised
        plays_of(shard, game.roles)


# --- tokens ----------------------------------------------------------------------------------------------------------

LETTERS = "0123456789|"
END = len(LETTERS)
VOCABULARY = END + 1


@dataclass
class Bigrams:
    """A language model: the next letter by the one before and by how far it is, in float32 as models are."""

    seed: int
    slack: float = 1e-4
    vocabulary: int = VOCABULARY
    longest: int = 12
    noise: float = 0.0

    def log_probs(self, take: Take, act: int, tokens: np.ndarray) -> np.ndarray:
        table = np.random.default_rng(self.seed).standard_normal((64, VOCABULARY, VOCABULARY)).astype(np.float32)
        before = [END, *tokens[:-1].tolist()]
        rows = np.stack([2 * table[(at + len(take.sights[act])) % 64, token] for at, token in enumerate(before)])
        rows = rows + self.noise * np.random.default_rng(1).standard_normal(rows.shape)
        return np.asarray(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)), np.float64)

    def text(self, tokens: np.ndarray) -> str:
        return "".join(LETTERS[token] for token in tokens if 0 <= token < END)

    def draw(self, take: Take, head: Head, index: int) -> Drawn:
        """As an actor draws: token by token, from noise that is committed for the whole act."""
        noise = token_noise(ALICE.peer_id, head, index, take.role, 0).gumbel((self.longest, VOCABULARY))
        tokens: list[int] = []
        for at in range(self.longest):
            row = self.log_probs(take, 0, np.array([*tokens, 0], np.int32))[-1]
            tokens.append(int((row + noise[at]).argmax()))
            if tokens[-1] == END:
                break
        told = np.array(tokens, np.int32)
        chosen = self.log_probs(take, 0, told)[np.arange(len(told)), told]
        return Drawn(told, chosen.astype(np.float32))


def said(model: Any, count: int = 40, edit: Callable[[int, Drawn], Drawn] | None = None) -> Shard:
    """A shard of answers to questions."""
    game = TextTask(SortDigits(3))
    (role,) = game.roles
    plays = []
    for index in range(count):
        scenario = Scenario(1000 + index)
        question = game.play(scenario, np.random.default_rng(scenario.seed))
        (ask,) = next(question)
        take = Take(role, game.roles[role], Learned("x"), scenario, index, 2)
        take.sights.append(ask.sight)
        plays.append((scenario, question, take))
    head = a_head([PlayOf(scenario, (Part(take, ()),)) for scenario, _, take in plays])
    head = replace(head, samples=count)
    found = []
    for index, (scenario, question, take) in enumerate(plays):
        drawn = model.draw(take, head, index)
        drawn = drawn if edit is None else edit(index, drawn)
        text = model.text(drawn.tokens) or ""
        take.acts.append(text)
        take.log_probs.append(float(drawn.log_probs.sum()))
        try:
            question.send((text,))
        except StopIteration as stop:
            take.rewards.append(float(np.float32(stop.value.rewards.get(role, 0.0))))
        found.append(PlayOf(scenario, (Part(take, (drawn,)),)))
    return sealed(game, found, head=head)


def looked_into(shard: Shard, judge: Any, **others: Any) -> Finding:
    game = TextTask(SortDigits(3))
    judges: Mapping[str, Any] = dict.fromkeys(game.roles, judge)
    return check_takes(shard, game, task=TASK, judges=judges, **others)


def test_tokens_that_the_committed_noise_asks_for_are_true() -> None:
    found = looked_into(said(Bigrams(1)), Bigrams(1))
    assert found.verdict is Verdict.TRUE, found
    assert {Lie.DRAWS, Lie.LOG_PROBS, Lie.REWARDS} <= found.looked


def test_rounding_of_another_machine_is_no_lie() -> None:
    assert looked_into(said(Bigrams(1, noise=2e-6), count=400), Bigrams(1)).verdict is Verdict.TRUE


def test_tokens_of_another_model_are_false() -> None:
    found = looked_into(said(Bigrams(2)), Bigrams(1))
    assert (found.verdict, found.lie) == (Verdict.FALSE, Lie.DRAWS)


def test_tokens_drawn_by_other_chance_are_false() -> None:
    def another(index: int, drawn: Drawn) -> Drawn:
        if index != 5:
            return drawn
        tokens = drawn.tokens.copy()
        tokens[0] = (tokens[0] + 1) % END
        return Drawn(tokens, drawn.log_probs)

    found = looked_into(said(Bigrams(1), edit=another), Bigrams(1))
    assert (found.verdict, found.lie, found.part) == (Verdict.FALSE, Lie.DRAWS, 5)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tokens: np.concatenate([tokens, tokens] * 12),
        lambda tokens: tokens - 1000,
        lambda tokens: tokens + VOCABULARY,
    ],
)
def test_tokens_that_there_are_not_and_too_many_are_false(edit: Callable[[np.ndarray], np.ndarray]) -> None:
    def another(index: int, drawn: Drawn) -> Drawn:
        if index != 5:
            return drawn
        tokens = edit(drawn.tokens)
        return Drawn(tokens, np.resize(drawn.log_probs, len(tokens)))

    found = looked_into(said(Bigrams(1), edit=another), Bigrams(1))
    assert (found.verdict, found.lie, found.part) == (Verdict.FALSE, Lie.FORM, 5)


def test_log_probabilities_of_tokens_that_were_edited_are_false() -> None:
    def another(index: int, drawn: Drawn) -> Drawn:
        return Drawn(drawn.tokens, drawn.log_probs - np.float32(0.01)) if index == 5 else drawn

    found = looked_into(said(Bigrams(1), edit=another), Bigrams(1))
    assert (found.verdict, found.lie, found.part) == (Verdict.FALSE, Lie.LOG_PROBS, 5)


def test_tokens_whose_model_is_not_here_cannot_be_told() -> None:
    shard = said(Bigrams(1))
    assert looked_into(shard, None).verdict is Verdict.CANNOT_BE_HAD
    believed = check_takes(shard, TextTask(SortDigits(3)), task=TASK)
    assert believed.verdict is Verdict.TRUE
    told = say(BOB, shard, Finding(Verdict.FALSE, "", Lie.DRAWS, 0, 5))
    assert told is not None
    assert disproved(hear(told, SWARM), shard, believed) == ()
    assert disproved(hear(told, SWARM), shard, looked_into(shard, Bigrams(1))) == (BOB.peer_id,)
    assert disproved(hear(told, SWARM), shard, looked_into(shard, Bigrams(1), until=5)) == ()


# --- a transformer of Shoal's own ------------------------------------------------------------------------------------


class OfTokens(tokens_of.TokenJudge):
    """A transformer that answers alone, by noise of the one act, where its judge goes over all of it at once."""

    def draw(self, take: Take, head: Head, index: int) -> Drawn:
        """As an actor does."""
        (drawn,) = self.model.complete([take], [token_noise(ALICE.peer_id, head, index, take.role, 0)])
        return drawn


def a_transformer(seed: int) -> tokens_of.TokenModel:
    model = tokens_of.TokenModel(width=32, layers=2, heads=2, context=64, seed=seed)
    model.flat[:] += np.random.default_rng(seed).normal(0, 0.2, model.flat.size).astype(np.float32)
    return model


def test_tokens_of_a_transformer_are_drawn_again_by_one_pass_over_the_whole() -> None:
    own = OfTokens(a_transformer(1))
    shard = said(own, count=60)
    found = looked_into(shard, own)
    assert found.verdict is Verdict.TRUE, found
    assert looked_into(shard, OfTokens(a_transformer(2))).lie is Lie.DRAWS


def test_an_end_in_the_middle_makes_no_act() -> None:
    def longer(index: int, drawn: Drawn) -> Drawn:
        if index != 5:
            return drawn
        twice = np.concatenate([drawn.tokens, drawn.tokens])
        return Drawn(twice, np.concatenate([drawn.log_probs, drawn.log_probs]))

    def shorter(index: int, drawn: Drawn) -> Drawn:
        return Drawn(drawn.tokens[:1], drawn.log_probs[:1]) if index == 5 else drawn

    own = OfTokens(a_transformer(1))
    for edit in (longer, shorter):
        found = looked_into(said(own, edit=edit), own)
        assert (found.verdict, found.lie, found.part) == (Verdict.FALSE, Lie.DRAWS, 5)


def test_only_the_plays_that_are_named_are_drawn_again() -> None:
    own, other = OfTokens(a_transformer(1)), OfTokens(a_transformer(2))
    shard, game = said(own), TextTask(SortDigits(3))
    judges: Mapping[str, Any] = dict.fromkeys(game.roles, other)

    def found(*redrawn: int) -> Finding:
        return check_plays(shard, plays_of(shard, game.roles), game, task=TASK, judges=judges, redrawn=redrawn)

    assert found(3, 30).part == 3
    assert found().verdict is Verdict.TRUE
    assert Lie.DRAWS not in found().looked


def test_acts_that_are_longer_than_what_was_asked_for_are_false() -> None:
    shard, game = said(OfTokens(a_transformer(1))), TextTask(SortDigits(3), max_tokens=5)
    found = check_plays(shard, plays_of(shard, game.roles), game, task=TASK, count=lambda text: len(text) + 1)
    assert (found.verdict, found.lie) == (Verdict.FALSE, Lie.FORM)
