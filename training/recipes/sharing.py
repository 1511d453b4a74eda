"""Plays that nodes share, in mode ``rollouts``: everybody acts and learns, from its own plays and from others'.

SAPO (arXiv 2509.08721): a swarm that shares what was played and no parameters. Whoever plays gives what it played in
an epoch as one shard (`shoal.training.rollouts.takes`), when its update begins; the others learn from it in one of
their next updates, as from their own plays. Of an update's plays, others' are at most the run's ``foreign_ratio``; a
node that has so many plays that many fewer itself. Policies may be each node's own, as in SAPO, or everybody's and
averaged.

Nobody chooses its luck: scenarios follow from the author and the epoch by the recipe's source, tokens from them and
from the policy (`shoal.training.rollouts.checking.token_noise`). Of every shard the scenarios are compared, every play
is played again with the acts that it gives and scored by the game here, and no act is longer than its ask allows. So a
false reward is found in the first shard that has one. Where the policy is everybody's, tokens are drawn again as well,
at the run's check rate, and in an epoch no more of one author than of another (`CHECKED_TOKENS`): long acts, however
right, take nobody else's time. Where it is its author's own, nobody can; but then nothing hangs on who said what: an
act is worth what it earns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import LimitError, ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.effects import Give
from shoal.training.manifest import Manifest
from shoal.training.models.tokens import TokenJudge, TokenModel
from shoal.training.recipes.playing import named_seats
from shoal.training.recipes.recipe import Recipe
from shoal.training.rollouts.admitting import Looked, refused
from shoal.training.rollouts.checking import check_plays, token_noise
from shoal.training.rollouts.evidence import Finding, Lie, Verdict
from shoal.training.rollouts.rows import DoesNotFitError
from shoal.training.rollouts.sampler import Sampler, Unit, units_of
from shoal.training.rollouts.shard import Head, Shard, ShardKind, open_shard
from shoal.training.rollouts.takes import MAX_PLAYS, Drawn, PlayOf, columns_of, play_of, plays_of
from shoal.training.tasks.base import Floats
from shoal.training.tasks.cast import Actor, Learned, Seat
from shoal.training.tasks.play import Take
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import News, Scenario, SharedPrompts, seed_of
from shoal.training.worker_calls import Admit

CHECKED_TOKENS: Final = 1024
"""Of one author in one epoch, that are drawn again."""
_UPDATES: Final = 4
"""Of foreign plays that may wait."""
_NOWHERE: Final = bytes(16)
"""Surroundings of games, whose scores are exact everywhere."""


class Committed:
    """A policy whose acts follow from what is played, so that others can draw them again.

    Attributes:
        head: of the shard that is being made, as far as acts follow from it; None: acts are drawn by any chance.
    """

    def __init__(self, model: TokenModel, author: PeerId) -> None:
        """Nothing is played yet."""
        self.head: Head | None = None
        self._model, self._author = model, author
        self._first: int | None = None
        self._drawn: dict[tuple[int, str], list[Drawn]] = {}

    def begin(self, head: Head) -> None:
        """Another version acts."""
        self.head, self._first, self._drawn = head, None, {}

    def act(self, takes: Sequence[Take], rng: np.random.Generator, greedy: bool) -> tuple[list[str], Floats]:
        """See `shoal.training.tasks.cast.Actor`."""
        head = self.head
        if head is None or greedy:
            return self._model.act(takes, rng, greedy)
        if self._first is None:  # all plays of a version that begin at once, the first among them, are asked at once
            self._first = min((take.play for take in takes if take.version == head.version), default=None)
        first = self._first or 0
        noises = [token_noise(self._author, head, take.play - first, take.role, len(take.acts)) for take in takes]
        drawn = self._model.complete(takes, noises)
        for take, each in zip(takes, drawn, strict=True):
            self._drawn.setdefault((take.play, take.role), []).append(each)
        log_probs = [each.log_probs.sum(dtype=np.float64) for each in drawn]
        return [self._model.said(each) for each in drawn], np.array(log_probs, np.float32)

    def in_order(self, plays: Sequence[Played]) -> Iterator[PlayOf]:
        """Plays of this version, from its first one on, without a gap; with how they were drawn."""
        number = self._first
        for played in sorted(plays, key=lambda each: each.number):
            if number is None or self.head is None or played.number < number:
                continue
            told = {take.role: self._drawn.get((played.number, take.role), []) for take in played.takes}
            if played.number > number or any(len(told[take.role]) != len(take) for take in played.takes):
                return
            yield play_of(played, told)
            number += 1


class Rationed:
    """A source of which so many scenarios are played in an epoch.

    Attributes:
        most: how many.
    """

    def __init__(self, source: SharedPrompts) -> None:
        """All."""
        self.source = source
        self.most = source.per_epoch * source.plays

    def draw(self, news: News, rng: np.random.Generator) -> Scenario | None:
        """The next."""
        return self.source.draw(news, rng) if news.drawn < self.most else None


class Sharing:
    """One node's part in it.

    Attributes:
        actors: who sits in the policy's seat when something is played that is given.
        source: of what is played.
        learned_from: whose plays the last update was made from, of which version, and how many acts.
    """

    def __init__(
        self, recipe: Recipe, manifest: Manifest, peer: PeerId, swarm: SwarmId, models: Mapping[str, Any]
    ) -> None:
        """Begin with nothing played.

        Args:
            recipe: that it is of.
            manifest: of the run.
            peer: this node.
            swarm: the run's name.
            models: of its policies, as they learn.

        Raises:
            UsageError: if plays of this recipe cannot be shared.
        """
        self.policy = _shared_policy(recipe, models)
        model = models[self.policy]
        source = recipe.source
        if not isinstance(source, SharedPrompts):
            raise UsageError(
                f"what is played in the recipe {recipe.name} follows not from the node and the epoch alone, so nobody "
                "could tell what others had to play; take a source such as OwnPrompts, or the mode local"
            )
        self._actor, self.source = Committed(model, peer), Rationed(source)
        self.actors: Mapping[Seat, Actor] = {Learned(self.policy): self._actor}
        self.learned_from: Sequence[tuple[PeerId, int, int]] = ()
        self._recipe, self._manifest, self._peer, self._swarm = recipe, manifest, peer, swarm
        self._plays_each = source.plays
        share = manifest.batch.largest_share
        self._share = share
        most = manifest.most_foreign
        self._rng = np.random.default_rng(seed_of(manifest.seed, peer, "sampler"))
        self._sampler = Sampler(most, _UPDATES * max(most, 1), self._rng)
        self._is_own = recipe.policies[self.policy].owner == "own"
        self._model = model
        self._judge: TokenModel | None = None
        self._copies: dict[int, Floats] = {}
        self._tokens: Counter[PeerId] = Counter()  # drawn again in this epoch
        self._taken: dict[tuple[PeerId, int], Cid] = {}  # whose, of which version

    # --- an epoch ---

    def holds(self, epoch: int, state: Cid) -> None:
        """The learner holds another policy."""
        self._tokens.clear()
        self._actor.begin(self._head(epoch, state))
        oldest = epoch - self._manifest.max_staleness
        self._sampler.forget_older(oldest)
        self._taken = {place: cid for place, cid in self._taken.items() if place[1] >= oldest}
        if not self._is_own:
            self._copies[epoch] = self._model.flat.copy()
            for old in [each for each in self._copies if not oldest <= each <= epoch]:
                del self._copies[old]

    def _head(self, epoch: int, state: Cid, samples: int = 1) -> Head:
        return Head(
            kind=ShardKind.TAKES,
            swarm=self._swarm,
            task=self._manifest.task,
            policy=self.policy,
            version=epoch,
            state=state,
            stream=epoch,  # one shard of each version
            number=0,
            samples=samples,
            surroundings=_NOWHERE,
        )

    def ration(self) -> None:
        """Before an epoch's first play: play as many whole groups as others' plays leave room for, one at least."""
        groups = -(-max(1, self._share - self._sampler.next) // self._plays_each)
        self.source.most = min(groups, self.source.source.per_epoch) * self._plays_each

    def given(self, plays: Sequence[Played]) -> Give | None:
        """A shard of an epoch's plays; None, if there is nothing to give."""
        head = self._actor.head
        if head is None:
            return None
        own = list(self._actor.in_order(plays))[:MAX_PLAYS]
        due = self._due(self._peer, head.version, len(own))
        own = [play for play, scenario in zip(own, due, strict=False) if play.scenario == scenario]
        own = own[: len(own) // self._plays_each * self._plays_each]
        samples = sum(len(part.take) for play in own for part in play.parts)
        if not samples:
            return None
        columns = columns_of(own, self._recipe.game.roles, with_sights=False)
        return Give(self._head(head.version, head.state, samples), columns)

    def drawn(self) -> list[Take]:
        """What the update that begins now learns from, of others'."""
        return [take for unit in self._sampler.draw() for take in unit.takes]

    def used(self) -> None:
        """It is done, or what it learned from led nowhere."""
        self.learned_from = self._sampler.used()

    @property
    def waiting(self) -> int:
        """Acts of others that wait for an update."""
        return self._sampler.waiting

    # --- what others give ---

    def admit(self, given: Admit, epoch: int) -> Looked:
        """Take a shard; as `shoal.training.rollouts.admitting.Admission.admit`.

        Everything but its tokens is looked into, whether it is to be checked or not. An author gives one shard of a
        version, and what it gives beside that is not used: the same plays, a little rounded, would teach twice.
        """
        try:
            shard = open_shard(given.shard, cid=given.cid, swarm=self._swarm)
            plays = plays_of(shard, self._recipe.game.roles)
        except (DoesNotFitError, LimitError) as error:
            return Looked(Finding(Verdict.DOES_NOT_FIT, str(error)))
        except ProtocolError as error:  # of whom it is, is not proven
            return Looked(Finding(Verdict.FALSE, str(error), Lie.FORM))
        found, redrawn = self._of_this_run(shard, given, epoch), frozenset[int]()
        is_checked = given.is_checked and found is None
        if found is None:
            self._taken[shard.author, shard.head.version] = given.cid
            if is_checked and not self._is_own:
                redrawn = self._affordable(shard.author, plays)
            is_checked = self._is_own or bool(redrawn)  # of what is its author's own nobody can look closer
            found = self._check(shard, plays, redrawn)
        if found.verdict is not Verdict.TRUE:
            if found.verdict is Verdict.FALSE:
                self._sampler.forget(shard.author)
            return refused(found, shard, is_checked)
        return Looked(found, self._sampler.add(self._units(shard, plays)), is_checked=is_checked)

    def _of_this_run(self, shard: Shard, given: Admit, epoch: int) -> Finding | None:
        """Why it is not to be used, whether it is true or not."""
        head = shard.head
        if shard.author != given.author:
            return Finding(Verdict.DOES_NOT_FIT, f"it is {shard.author}'s, and was named by another")
        if head.policy != self.policy or head.stream != head.version or head.number:
            return Finding(Verdict.DOES_NOT_FIT, "it is of another policy, or none of one epoch's plays")
        if not epoch - self._manifest.max_staleness <= head.version <= epoch:
            return Finding(Verdict.DOES_NOT_FIT, f"its policy is of epoch {head.version}, which is not used at {epoch}")
        if given.state is None:
            return Finding(Verdict.CANNOT_BE_HAD, f"the policy of epoch {head.version} is not known here")
        if head.state != given.state:
            return Finding(Verdict.DOES_NOT_FIT, f"its policy is not this run's of epoch {head.version}")
        if head.samples > 2 * self._share:
            return Finding(Verdict.DOES_NOT_FIT, f"{head.samples} acts are more than anybody plays in an epoch")
        if self._taken.get((shard.author, head.version), given.cid) != given.cid:
            return Finding(Verdict.DOES_NOT_FIT, f"its author gave another one of epoch {head.version} before")
        return None

    def _check(self, shard: Shard, plays: Sequence[PlayOf], redrawn: frozenset[int]) -> Finding:
        version = shard.head.version
        judge = self._judging(version) if redrawn and version in self._copies else None
        return check_plays(
            shard,
            plays,
            self._recipe.game,
            task=self._manifest.task,
            scenarios=self._due(shard.author, version, len(plays)),
            judges={role: judge for role in self._recipe.game.roles} if redrawn else {},  # noqa: C420  of two types
            redrawn=redrawn,
            count=self._model.count,
        )

    def _due(self, author: PeerId, version: int, count: int) -> list[Scenario]:
        """What somebody had to play first in an epoch."""
        news = [News(version, own=seed_of(self._manifest.seed, author), drawn=number) for number in range(count)]
        found = [self.source.source.draw(each, self._rng) for each in news]
        return [scenario for scenario in found if scenario is not None]

    def _judging(self, version: int) -> TokenJudge:
        if self._judge is None:
            self._judge = self._model.alike()
        self._judge.flat[:] = self._copies[version]
        return TokenJudge(self._judge)

    def _affordable(self, author: PeerId, plays: Sequence[PlayOf]) -> frozenset[int]:
        """Of which plays tokens are drawn again: any, until their author has had its part of this epoch."""
        chosen = set[int]()
        for number in self._rng.permutation(len(plays)).tolist():
            tokens = sum(self._model.count(act) for part in plays[number].parts for act in part.take.acts)
            if self._tokens[author] and self._tokens[author] + tokens > CHECKED_TOKENS:
                break
            self._tokens[author] += tokens
            chosen.add(number)
        return frozenset(chosen)

    def _units(self, shard: Shard, plays: Sequence[PlayOf]) -> list[Unit]:
        for play in plays:
            for part in play.parts:
                part.take.seat = Learned(self.policy)
        return units_of(shard.author, shard.head.version, plays)


def _shared_policy(recipe: Recipe, models: Mapping[str, Any]) -> str:
    """The one policy that plays everything.

    Raises:
        UsageError: if there is no such, or it draws by nothing that others could have again.
    """
    (policy, *others) = recipe.policies
    is_alone = not others and len(recipe.parts) == 1 and named_seats(recipe) == (Learned(policy),)
    if not is_alone or recipe.is_shown or not isinstance(models[policy], TokenModel):
        raise UsageError(
            f"plays of the recipe {recipe.name} are not shared: that takes one policy in all seats, which is a model "
            "called tokens; take the mode local"
        )
    return policy
