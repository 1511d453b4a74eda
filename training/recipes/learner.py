"""One node's part in a recipe: it plays, trains the recipe's policies on what was played, and probes them.

To whoever drives it, it is a learner like any other (`shoal.training.algorithms.Learner`). What all nodes hold is the
*shared* state: what is averaged of each policy, and how far the run is. A policy that is each node's own, and what is
not averaged of one that is shared in part, lie in a file of the node's (`PRIVATE`), so that a worker that was killed
goes on with them; they are nobody else's business, and in no digest.

An epoch's turns are counted in asks of the game. A source that has no more before that ends the epoch for this node.

**How it begins.** Policies are alike everywhere at epoch 0, but for those that are varied. Those that are to be taught
first (`Warm`) are taught in the first epoch, by each node for itself, which plays nothing in it; of those that are
averaged all take what the node made whose name comes first (``first/`` of `exchange.averager`), as torch's results
differ in their last bits from machine to machine. A newcomer teaches what is its own before it plays. Where nodes have
places (`placing`), one without plays what its source gives it so, which may be nothing, until the next update; so does
one that was not told which of several parts it is.

What objectives remember between updates (`shoal.training.algorithms.takes.Remembering`) is this node's alone as well. A
worker that was killed goes on from what it was after the last update that is done; an update that fails leaves it.

**What is shown.** A part that shows plays (`Part.shows`) posts what it played, once in each life, before the update in
which the others are to read it. They hold it to the game, keep it for as long as they live, and give each policy what
was done in its roles, beside the policy's own plays: takes that are not proven.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.protocol.errors import ProtocolError, UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.training.algorithms.base import (
    AnyUpdate,
    AskingUpdate,
    Collected,
    DivergedError,
    Exchange,
    Update,
    UpdateStats,
)
from shoal.training.algorithms.joint import together
from shoal.training.algorithms.rollouts import never
from shoal.training.algorithms.takes import Mindful, Trainee
from shoal.training.effects import Effect, Latest, Post, Scores, Wanted
from shoal.training.exchange.averager import Arrays, Contribution
from shoal.training.manifest import Manifest
from shoal.training.plugins import suggest
from shoal.training.recipes.fixed import SLACK_BYTES, Fixeds
from shoal.training.recipes.makers import make_model, objective_of
from shoal.training.recipes.past import Pasts
from shoal.training.recipes.placing import NOWHERE, check_said, number_of, part_of, place_of
from shoal.training.recipes.playing import named_seats, roles_of, score_of, seats_of
from shoal.training.recipes.recipe import Policy, Probe, Recipe
from shoal.training.recipes.seating import Seating
from shoal.training.recipes.sharing import Sharing
from shoal.training.recipes.warming import teach
from shoal.training.rollouts.admitting import Looked
from shoal.training.scored import MAX_EPOCHS, Scored
from shoal.training.state import check_fit, decode_arrays, encode_arrays
from shoal.training.tasks import shown
from shoal.training.tasks.cast import Actor, Fixed, Foreign, Learned, Past, Person, Scripted, Seat
from shoal.training.tasks.failures import Failures, TaskFailedError
from shoal.training.tasks.play import Act, Role, Table, Take
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import News, Posted, Source, seed_of
from shoal.training.tasks.stage import Collecting, Stage, Staged, alone
from shoal.training.tasks.wire import decode_acts, decode_takes, encode_acts
from shoal.training.worker_calls import Admit

log = logging.getLogger(__name__)

PRIVATE: Final = "private.safetensors"
"""In the run's folder: what is this node's alone."""
NEWS: Final = "news"
"""The section of an exchange that says how far the run is."""
_MAX_BACKLOG: Final = 8
_PROBE_TRIES: Final = 3
"""For a probe of which every play was lost since nobody answered, as while the process of another framework died."""
_MAX_EPOCH: Final = 2**53


class RecipeLearner:
    """See the head of this module.

    Attributes:
        scores: by probe, what the last `evaluate` found; and, as ``policy.metric``, what the last update said of
            itself.
    """

    def __init__(
        self, recipe: Recipe, manifest: Manifest, failures: Failures, *, peer: PeerId, life: str = "", part: str = ""
    ) -> None:
        """Begin with nothing played.

        Args:
            recipe: that it is of.
            manifest: of the run.
            failures: told what fails in games.
            peer: this node.
            life: another text for every worker.
            part: what it was told to be; empty: nothing, so that the others and it agree on what it is.

        Raises:
            UsageError: if a policy's model or objective cannot be made so, or the recipe has no such part.
        """
        if part and part not in recipe.parts:
            raise UsageError(f"the recipe {recipe.name} has no part {part[:40]!r}; {suggest(part, recipe.parts)}")
        self._posts: dict[str, tuple[Posted, ...]] = {}
        self._shown: dict[PeerId, tuple[Cid, list[Take]]] = {}
        self._num_seen = 0
        self._has_shown = False
        self._evaluations: dict[str, dict[int, float]] = {}
        self.scores: dict[str, float] = {}
        self._recipe, self._failures = recipe, failures
        self._manifest, self._peer = manifest, peer
        self._sharing: Sharing | None = None
        self._share = manifest.batch.largest_share
        self._own_seed = own_seed = seed_of(manifest.seed, peer)
        self._trainees = {
            name: _trainee(recipe, name, policy, manifest, own_seed) for name, policy in sorted(recipe.policies.items())
        }
        self._taught = {name: policy.warm is None for name, policy in recipe.policies.items()}
        self._seed = seed_of(manifest.seed, peer, life)
        self._answers = np.random.default_rng(seed_of(self._seed, "answers"))
        named = named_seats(recipe)
        self._people = frozenset(seat.part for seat in named if isinstance(seat, Person))
        make = partial(_model, recipe, manifest.seed)
        self._pasts = Pasts([seat for seat in named if isinstance(seat, Past)], self._models, make)
        self._fixed = Fixeds(
            [seat for seat in named if isinstance(seat, Fixed)],
            self._models,
            make,
            SLACK_BYTES + sum(map(_state_bytes, self._trainees.values())),
        )
        self._kept_at = -1  # the epoch that was kept last
        self._actors = Seating(
            {
                **{Learned(name): trainee.actor for name, trainee in self._trainees.items()},
                **{Scripted(name): make(recipe.game) for name, make in recipe.scripts.items()},
            },
            self._pasts,
            self._fixed,
            lambda: self._epoch,
            recipe.roles,
            [seat for seat in named if isinstance(seat, Foreign)],
            own_seed,
        )
        self._was_told = bool(part)
        self._part = ""
        self._stage: Stage | None = None
        if part or len(recipe.parts) == 1:
            self._be(part or next(iter(recipe.parts)))
        self._plays: list[Played] = []
        self._turns = 0
        self._is_exhausted = False
        self._epoch = self._env_steps = 0
        self._number, self._place, self._found_part = number_of(peer), NOWHERE, ""
        self._running: AnyUpdate | None = None
        self._folder: Path | None = None

    # --- plays that are shared, in mode rollouts ---

    def share(self, swarm: SwarmId) -> None:
        """Give what is played from now on, and learn from what others give; see `SharesPlays`.

        Raises:
            UsageError: if plays of this recipe cannot be shared.
        """
        models = {name: trainee.model for name, trainee in self._trainees.items()}
        self._sharing = Sharing(self._recipe, self._manifest, self._peer, swarm, models)
        self._be(self._part)

    def holds(self, epoch: int, state: Cid) -> None:
        """The shared state is called so."""
        if self._sharing is not None:
            self._sharing.holds(epoch, state)

    def admit(self, given: Admit, epoch: int) -> Looked:
        """Take a shard; see `SharesPlays`. All of its plays are played again, whatever its chance is."""
        if self._sharing is None:
            raise UsageError("this learner shares nothing; call share() first")
        return self._sharing.admit(given, epoch)

    @property
    def num_foreign(self) -> int:
        """Acts of others that wait for an update."""
        return 0 if self._sharing is None else self._sharing.waiting

    @property
    def learned_from(self) -> Sequence[tuple[PeerId, int, int]]:
        """What of others' the last update was made from; see `SharesPlays`."""
        return () if self._sharing is None else self._sharing.learned_from

    @property
    def part(self) -> str:
        """What this node is; empty: nothing yet."""
        return self._part

    @property
    def seats_for_people(self) -> Mapping[str, Role]:
        """The roles that a person at this node may play; none, unless a cast has people play this node's part."""
        return self._recipe.roles if self._part in self._people else {}

    def _be(self, part: str) -> None:
        """Play and train what this part does from now on."""
        scene, plays = self._recipe.scene(part), self._recipe.plays
        self._part = part
        source: Source = scene.source
        actors: Mapping[Seat, Actor] = self._actors
        if self._sharing is not None:
            source, actors = self._sharing.source, self._sharing.actors
        self._stage = Stage(scene.game, source, scene.cast, actors, plays, seed=self._seed, failures=self._failures)

    def close(self) -> None:
        """End the processes that it started; whoever sits there is started anew if it is asked again."""
        self._actors.close()

    # --- what is this node's alone ---

    def settle_in(self, folder: Path) -> None:
        """Keep what is this node's alone in a folder, and go on from what is there."""
        self._folder = folder
        if self._pasts:
            self._pasts.settle_in(folder)
        path = folder / PRIVATE
        if not path.exists():
            return
        try:
            arrays, meta = decode_arrays(path.read_bytes())
            for name, trainee in self._trainees.items():
                own = _under(name, arrays)
                if own:
                    check_fit(own, trainee.private())
                    trainee.load(own)
                    self._taught[name] = bool(meta.get("taught", {}).get(name, False))
                trainee.remember(meta.get("memories", {}).get(name, {}))
            self._place = int(meta.get("place", NOWHERE))
            if not self._was_told and meta.get("part") in self._recipe.parts:
                self._be(meta["part"])
        except (ProtocolError, OSError) as error:
            log.warning("what this node had of its own in %s cannot be read (%s): it begins anew", path, error)

    def _keep(self) -> None:
        private: Arrays = {}
        for name, trainee in self._trainees.items():
            if trainee.is_own or not trainee.is_whole:
                private |= {f"{name}/{key}": array for key, array in trainee.private().items()}
        memories = {name: memory for name, trainee in self._trainees.items() if (memory := trainee.memory())}
        if self._folder is None or not (private or memories or self._is_placing):
            return
        path = self._folder / PRIVATE
        half = path.with_name(path.name + ".part")
        meta = {"taught": self._taught, "place": self._place, "part": self._part, "memories": memories}
        half.write_bytes(encode_arrays(private, meta))
        half.replace(path)

    # --- playing ---

    @property
    def samples(self) -> int:
        """Turns that wait for the next update; a whole share, once the source has no more."""
        return max(self._turns, self._share) if self._is_exhausted else self._turns

    def collect(self, num_steps: int, is_over: Callable[[], bool] = never) -> Collected:
        """Play so many turns on; see `Learner.collect`. Who sits at another node does not answer."""
        return alone(self.collecting(num_steps, is_over))

    def collecting(self, num_steps: int, is_over: Callable[[], bool] = never) -> Generator[Wanted, Any, Collected]:
        """The same; see `shoal.training.algorithms.base.Consulting`."""
        self._require_idle()
        if not all(self._taught.values()):
            self._teach()
        stage = self._stage
        if (
            (self._epoch == 0 and self._is_warming)
            or stage is None
            or not self._recipe.parts[self._part].acts
            or self._has_shown
        ):
            self._is_exhausted = True
            return Collected(0, self.samples, ())
        if self._turns > _MAX_BACKLOG * self._share:
            raise UsageError(f"{self._turns} turns wait for an update; call update() or abandon() first")
        if not (yield from self._fixed.fetching()):
            return Collected(0, self.samples, ())
        self._keep_past()
        if self._sharing is not None and not self._turns:
            self._sharing.ration()
        staged = yield from _told(stage.collect(self._news, num_steps, is_over=is_over))
        self._turns += staged.turns
        self._plays += staged.plays
        self._is_exhausted = staged.is_exhausted
        returns = tuple(score_of(played, self._recipe.probes[0].score) for played in staged.plays)
        return Collected(staged.turns, self.samples, returns)

    def _keep_past(self) -> None:
        """Before something is played in an epoch."""
        if self._kept_at != self._epoch:
            self._pasts.keep(self._epoch)
            self._kept_at = self._epoch

    def collect_ahead(self, is_over: Callable[[], bool]) -> Collected:
        """Nothing: the policies are at work."""
        return Collected(0, self.samples, ())

    @property
    def _is_warming(self) -> bool:
        return any(policy.warm is not None for policy in self._recipe.policies.values())

    @property
    def _news(self) -> News:
        return News(
            self._epoch,
            self._env_steps,
            evaluations=self._evaluations,
            posts=self._posts,
            own=self._own_seed,
            place=self._place,
        )

    @property
    def _is_placing(self) -> bool:
        """Whether nodes agree on who has which place, or is which part."""
        return self._recipe.is_placed or len(self._recipe.parts) > 1

    def _teach(self) -> None:
        for name, policy in sorted(self._recipe.policies.items()):
            if policy.warm is not None and not self._taught[name]:
                rng = np.random.default_rng(seed_of(self._own_seed, "warm", name))
                teach(policy.warm, self._recipe, name, self._trainees[name], rng)
                self._taught[name] = True

    # --- learning ---

    def update(self) -> AnyUpdate:
        """Learn from what was played; see `Learner.update`."""
        self._require_idle()
        self._running = self._update()
        return self._running

    def _update(self) -> AnyUpdate:
        before = {name: (trainee.snapshot(), trainee.memory()) for name, trainee in self._trainees.items()}
        env_steps, place = self._env_steps, self._place
        self._found_part = ""
        try:
            yield from self._hear()
            if self._shows and not self._has_shown and self._plays:
                posted = yield Post(shown.TOPIC, shown.show(self._plays, self._recipe.game.roles))
                self._has_shown = posted is not None
            others: list[Take] = []
            if self._sharing is not None:
                given = self._sharing.given(self._plays)
                if given is not None:
                    yield given
                others = self._sharing.drawn()
            updates: dict[str, AskingUpdate] = {NEWS: self._count()}
            for name, trainee in self._trainees.items():
                if self._epoch == 0 and self._is_warming:
                    updates[name] = self._agree(name, trainee)
                elif not self._recipe.policies[name].is_frozen:
                    takes = self._takes(name) + others if self._trains(name) else []
                    if isinstance(trainee.objective, Mindful) and takes:
                        trainee.objective.meet(self._all_takes(), self._models)
                    updates[name] = trainee.update(takes, self._news)
            stats = yield from together(updates, max(1, self._turns) if self._is_exhausted else self._turns)
            for topic in self._recipe.topics:
                self._posts[topic] = tuple((yield Latest(topic)))
            if self._recipe.is_shown:
                self._see((yield Latest(shown.TOPIC, shown.MAX_POSTS)))
        except BaseException as error:
            if self._sharing is not None and isinstance(error, DivergedError | ProtocolError):
                self._sharing.used()  # what others played may be why, and would be again
            for name, trainee in self._trainees.items():
                arrays, memory = before[name]
                trainee.load(arrays)
                trainee.remember(memory)
            self._env_steps, self._place = env_steps, place
            raise
        finally:
            self._running = None
        for trainee in self._trainees.values():
            trainee.used()
        if self._sharing is not None:
            self._sharing.used()
        self._drop()
        self._epoch += 1
        if self._found_part and not self._part:
            self._be(self._found_part)
        self._keep()
        metrics = {f"{name}.{key}": value for name, each in stats.items() for key, value in each.metrics.items()}
        self.scores = {name: value for name, value in self.scores.items() if "." not in name} | metrics
        steps = max((each.steps for each in stats.values()), default=0)
        return UpdateStats(sum(each.samples for each in stats.values()), steps, metrics)

    def _hear(self) -> Generator[Effect, Any, None]:
        """What members have signed of the probes that the recipe wants heard."""
        if self._recipe.heard:
            told: tuple[Scored, ...] = yield Scores(self._recipe.heard, max(0, self._epoch - MAX_EPOCHS))
            self._evaluations = {name: {} for name in self._recipe.heard}
            for each in told:
                self._evaluations[each.probe][each.epoch] = each.score

    @property
    def _shows(self) -> bool:
        return bool(self._part) and self._recipe.parts[self._part].shows

    def _trains(self, policy: str) -> bool:
        """Whether this node's part does; one that is nothing yet trains nothing."""
        patterns = self._recipe.parts[self._part].trains if self._part else ()
        return any(fnmatchcase(policy, pattern) for pattern in patterns)

    def _takes(self, policy: str) -> list[Take]:
        """What this policy did, of what is known how likely it was; and what was shown of its roles."""
        seat = Learned(policy)
        own = [take for played in self._plays for take in played.takes if take.seat == seat and take.proven]
        return own + [take for _, takes in self._shown.values() for take in takes if take.seat == seat]

    def _all_takes(self) -> Iterator[Take]:
        """Of all roles, played here and shown."""
        for played in self._plays:
            yield from played.takes
        for _, takes in self._shown.values():
            yield from takes

    @property
    def _models(self) -> dict[str, Any]:
        return {name: trainee.model for name, trainee in self._trainees.items()}

    def _see(self, posts: Sequence[Posted]) -> None:
        """Keep the newest that each shows, also of who is gone; of as many authors as there is room for."""
        recipe = self._recipe
        seats = seats_of(recipe.scenes[0])
        newest = {post.author: post for post in reversed(posts)}
        for author, post in newest.items():
            kept = self._shown.get(author)
            if kept[0] == post.cid if kept is not None else len(self._shown) >= shown.MAX_AUTHORS:
                continue
            first = self._num_seen * shown.MAX_PLAYS
            self._shown[author] = (post.cid, shown.read_shown(post, recipe.game.roles, seats, first))
            self._num_seen += 1

    def _count(self) -> Update:
        """How many turns went into this epoch, of all; and who has which place."""
        own: Arrays = {"sum/turns": np.asarray(self._turns, np.int64)}
        if self._recipe.is_placed:
            own["each/places"] = np.array([self._number, self._place], np.int64)
        names = list(self._recipe.parts)
        if len(names) > 1:
            own["each/parts"] = np.array([self._number, names.index(self._part) if self._part else NOWHERE], np.int64)
        merged = yield Exchange(own, 1.0, own, partial(_check_news, 2 * _MAX_BACKLOG * self._share, len(names)))
        if merged:
            said, parts = merged.pop("each/places", None), merged.pop("each/parts", None)
            check_fit(merged, {"sum/turns": own["sum/turns"]})
            self._env_steps += int(merged["sum/turns"])
            if said is not None:
                self._place = place_of(self._number, said.astype(np.int64))
            if parts is not None:
                self._found_part = part_of(self._number, parts.astype(np.int64), self._recipe.parts)
        return UpdateStats(0, 0)

    def _agree(self, name: str, trainee: Trainee) -> Update:
        """Begin with what one of all has taught; with the own, if it is the node's own."""
        if trainee.is_own or self._recipe.policies[name].warm is None:
            return UpdateStats(0, 0)
        own: Arrays = {f"first/{key}": array.copy() for key, array in trainee.shared().items() if _is_float(array)}
        merged = yield Exchange(own, 1.0, own, partial(_check_first, trainee))
        if merged:
            check_fit(merged, own)
            trainee.load({key.removeprefix("first/"): array for key, array in merged.items()})
        return UpdateStats(0, 0)

    def abandon(self) -> None:
        """Drop what was played and any half-done update. Plays under way go on."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self._drop()

    def _drop(self) -> None:
        self._plays, self._turns, self._is_exhausted = [], 0, False

    # --- the state that all share ---

    def export_state(self) -> Arrays:
        """What all nodes hold, copied."""
        self._require_idle()
        return {name: array.copy() for name, array in self._state().items()}

    def import_state(self, arrays: Arrays, *, keep_samples: bool = False) -> None:
        """Take a state that some node exported; see `Learner.import_state`."""
        check_fit(arrays, self._state())
        epoch, env_steps = int(arrays["epoch"]), int(arrays["env_steps"])
        if not 0 <= epoch <= _MAX_EPOCH or not 0 <= env_steps <= _MAX_EPOCH:
            raise ProtocolError(f"no run is at epoch {epoch} with {env_steps} turns; take another state")
        for name, trainee in self._trainees.items():
            trainee.check(_under(name, arrays))
        if self._running is not None:
            self._running.close()
            self._running = None
        if not keep_samples:
            self._drop()
        for name, trainee in self._trainees.items():
            trainee.load(_under(name, arrays))
            if epoch > 0 and not trainee.is_own:
                self._taught[name] = True
        self._epoch, self._env_steps = epoch, env_steps
        self._kept_at = -1
        self._is_exhausted = False  # in this epoch there is more to play

    def policy_arrays(self) -> Arrays:
        """The parameters that all nodes hold, copied."""
        return {name: array.copy() for name, array in self._state().items() if "/parameters/" in name}

    def _state(self) -> Arrays:
        found: Arrays = {
            "epoch": np.asarray(self._epoch, np.int64),
            "env_steps": np.asarray(self._env_steps, np.int64),
        }
        for name, trainee in self._trainees.items():
            found |= {f"{name}/{key}": array for key, array in trainee.shared().items()}
        return found

    # --- probing ---

    def evaluate(self, episodes: int, seed: int) -> list[float]:
        """Play all probes; the scores of the first one's plays. Their number is the probe's own business.

        A node that has no place yet probes what the first one has.

        Raises:
            TaskFailedError: if no play of a probe came to an end.
        """
        return alone(self.evaluating(episodes, seed))

    def evaluating(self, episodes: int, seed: int) -> Generator[Wanted, Any, list[float]]:
        """The same; see `shoal.training.algorithms.base.Consulting`. Waits until it has what is fixed."""
        while not (yield from self._fixed.fetching()):
            pass
        self._keep_past()
        first: list[float] = []
        for number, probe in enumerate(self._recipe.probes):
            found = yield from self._probe(probe, seed)
            self.scores[probe.name] = float(np.mean(found))
            if number == 0:
                first = found
        if not first:
            raise TaskFailedError(
                f"this node has nothing to play of {self._recipe.probes[0].name!r}; it may have later"
            )
        return first

    def answer(self, policy: str, takes: bytes | memoryview) -> bytes:
        """What a policy does where another node's takes stand; see `shoal.training.algorithms.base.Consulting`."""
        answers = self._recipe.parts[self._part].answers if self._part else ()
        if policy not in answers or policy not in self._trainees:
            raise UsageError(f"this node does not answer by the policy {policy[:40]!r}")
        waiting = decode_takes(takes, self._recipe.roles, Learned(policy))
        if not waiting:
            return encode_acts(())
        acts, _ = self._trainees[policy].actor.act(Table(waiting), self._answers, greedy=False)
        return encode_acts(list(acts))

    def _probe(self, probe: Probe, seed: int) -> Generator[Wanted, Any, list[float]]:
        recipe = self._recipe
        cast = recipe.cast if probe.cast is None else probe.cast
        news = replace(self._news, place=max(0, self._place))
        for _ in range(_PROBE_TRIES):
            stage = Stage(
                recipe.game, probe.source, cast, self._actors, recipe.plays, seed=seed, failures=self._failures
            )
            staged = yield from _told(stage.collect(news, greedy=probe.greedy))
            if staged.plays or not staged.dropped.get("unanswered"):
                break
        else:
            raise TaskFailedError(
                f"nobody answers in any play of the probe {probe.name!r}; give its seats of others an otherwise"
            )
        if probe.measure is not None and staged.plays:
            return [probe.measure(staged.plays, self._trainees)]
        found = [score_of(played, probe.score) for played in staged.plays]
        if not found:
            raise TaskFailedError(f"no play of the probe {probe.name!r} came to an end: {self._failures.summary}")
        return found

    def _require_idle(self) -> None:
        if self._running is not None:
            raise UsageError("an update is under way; finish it or call abandon() first")


def _trainee(recipe: Recipe, name: str, policy: Policy, manifest: Manifest, own_seed: int) -> Trainee:
    seed = own_seed if policy.is_varied else manifest.seed
    return Trainee(
        _model(recipe, seed, name),
        objective_of(policy.objective, policy.settings, recipe.objectives()),
        mode=manifest.mode,
        codec=manifest.codec,
        seed=seed_of(own_seed, "order", name),
        is_own=policy.owner == "own",
        shared=policy.shared,
    )


def _state_bytes(trainee: Trainee) -> int:
    """Of a policy with what its optimiser, and that of mode ``diloco``, remember."""
    return sum(array.nbytes for array in trainee.private().values()) + trainee.model.flat.nbytes


def _model(recipe: Recipe, seed: int, name: str) -> Any:
    """Of a policy's kind, as it begins."""
    policy = recipe.policies[name]
    return make_model(policy.model, policy.sizes, seed_of(seed, "model", name), partial(roles_of, recipe, name))


def _told(collecting: Collecting) -> Generator[Wanted, Any, Staged]:
    """Play on; answers come as bytes, and what is none is no answer."""
    answer: tuple[Act | None, ...] | None = None
    while True:
        try:
            asked = collecting.send(answer)
        except StopIteration as end:
            staged: Staged = end.value
            return staged
        data = yield asked
        answer = None
        if data is not None:
            try:
                answer = decode_acts(data, [take.spaces.acts for take in asked.takes])
            except ProtocolError as error:
                log.warning("who plays %s answers with what is no act: %s", asked.part, error)


def _under(name: str, arrays: Mapping[str, Any]) -> Arrays:
    """What is a policy's among arrays of all."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _is_float(array: np.ndarray[Any, Any]) -> bool:
    return bool(array.dtype == np.float32)


def _check_news(most: int, num_parts: int, contribution: Contribution) -> None:
    if "each/places" in contribution.arrays:
        check_said(contribution.arrays["each/places"])
    if "each/parts" in contribution.arrays:
        check_said(contribution.arrays["each/parts"], num_parts)
    if not 0 <= int(contribution.arrays["sum/turns"]) <= most:
        raise ProtocolError(f"{contribution.author} says that it took more turns than anybody can; leave it out")


def _check_first(trainee: Trainee, contribution: Contribution) -> None:
    said = {key.removeprefix("first/"): array for key, array in contribution.arrays.items()}
    trainee.check(trainee.shared() | said)
