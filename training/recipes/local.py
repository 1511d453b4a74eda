"""Several nodes' parts in a recipe in one process and without a network: for tests, and to try a recipe.

The learners are the real ones, and so is what merges (`shoal.training.merging`): every exchange goes through the bytes
that it would go through between nodes. What is left out is the network, and that nodes are of unlike speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from shoal.crdt.views import Evaluation
from shoal.protocol.errors import UsageError
from shoal.protocol.ids import Cid, PeerId, SwarmId
from shoal.protocol.signing import Signer
from shoal.training.algorithms.base import AnyUpdate, DivergedError, Exchange, Joint
from shoal.training.arena import Arena
from shoal.training.effects import Effect, Give, Latest, Post, Scores
from shoal.training.exchange.rules import Aggregator
from shoal.training.manifest import Manifest, Mode
from shoal.training.merging import Given, Merging
from shoal.training.recipes.learner import RecipeLearner
from shoal.training.recipes.placing import parts_of
from shoal.training.recipes.recipe import Recipe, Report
from shoal.training.rollouts import evidence
from shoal.training.rollouts.evidence import Finding
from shoal.training.rollouts.intake import UPDATES_TAKEN
from shoal.training.rollouts.shard import seal
from shoal.training.scored import Scored, medians
from shoal.training.state import encode_arrays
from shoal.training.tasks.failures import Failures
from shoal.training.tasks.source import Posted
from shoal.training.worker_calls import Admit

_NO_STATE: Final = Cid.of_block(b"")
_SWARM: Final = SwarmId.of_manifest(b"in one process")


def peers(count: int) -> list[PeerId]:
    """Names for so many nodes, ascending."""
    return sorted(PeerId.of_public_key(bytes([number + 1]) * 32) for number in range(count))


def manifest_of(recipe: Recipe, owner: PeerId, seed: int = 0, **settings: Any) -> Manifest:
    """A manifest as `shoal recipe run` makes it."""
    wanted = {
        "task": f"recipe:{recipe.name}",
        "algorithm": "recipe",
        "mode": recipe.mode,
        "batch_per_learner": recipe.turns,
        "eval_interval": recipe.eval_interval,
        **settings,
    }
    return Manifest(owner=owner, seed=seed, **wanted)


class Board:
    """What everybody has posted, and signed of its probes."""

    def __init__(self) -> None:
        self._posted: list[tuple[str, Posted]] = []
        self._signed: list[Evaluation] = []

    def sign(self, author: PeerId, epoch: int, scores: Mapping[str, float]) -> None:
        """What one found of the policies of an epoch, later than those before."""
        self._signed.append(Evaluation(epoch, _NO_STATE, 0.0, 0, 1, author, tuple(sorted(scores.items()))))

    def answer(self, author: PeerId, epoch: int, effect: Effect) -> Cid | tuple[Posted, ...] | tuple[Scored, ...]:
        """As a node would."""
        match effect:
            case Post(topic, arrays, meta):
                cid = Cid.of_block(encode_arrays(arrays, meta))
                self._posted.insert(0, (topic, Posted(author, cid, epoch, arrays, meta)))
                return cid
            case Latest(topic, count, max_age):
                found = [each for name, each in self._posted if name == topic]
                return tuple(each for each in found if max_age is None or epoch - each.epoch <= max_age)[:count]
            case Scores(probes, since):
                return medians(self._signed, probes, since, epoch, {each.author for each in self._signed})
            case Give():
                raise UsageError("a shard is signed by its author, which a board is not; let a Company hand it on")


class Company:
    """Learners of one recipe, of all parts as `shoal recipe run` gives them out, and what merges for each.

    In mode ``rollouts`` they share what they play: each shard is signed, and looked into by every other learner.

    Attributes:
        learners: by name.
        board: of what they post.
        findings: of shards: by whom, of whom, and what was found.
    """

    def __init__(
        self,
        recipe: Recipe,
        names: Sequence[PeerId],
        seed: int = 0,
        *,
        keys: Sequence[Signer] = (),
        tamper: Callable[[PeerId, Give], Give] = lambda _, given: given,
        **settings: Any,
    ) -> None:
        """Begin a run.

        Args:
            recipe: that it is of.
            names: of the nodes.
            seed: of the run.
            keys: theirs, in mode ``rollouts``.
            tamper: what a liar makes of its shards before it signs them.
            settings: of the manifest.
        """
        manifest = manifest_of(recipe, names[0], seed, **settings)
        self.learners = {
            name: RecipeLearner(recipe, manifest, Failures(recipe.name), peer=name, life="0", part=part)
            for name, part in zip(names, parts_of(len(names), recipe.parts), strict=True)
        }
        self.board = Board()
        self._epoch = 0
        self._shunned: dict[PeerId, set[PeerId]] = {name: set() for name in names}
        self.findings: list[tuple[PeerId, PeerId, Finding]] = []
        self._keys, self._tamper = {key.peer_id: key for key in keys}, tamper
        self._check_rate, self._most_foreign = manifest.check_rate, manifest.most_foreign
        self._coming: list[tuple[PeerId, Cid, bytes]] = []
        self._rng = np.random.default_rng(seed)
        if manifest.mode is Mode.ROLLOUTS:
            for learner in self.learners.values():
                learner.share(_SWARM)
            self._name_states()
        self._recipe = recipe
        self._merging = {
            name: Merging(Aggregator.parse(manifest.aggregator), manifest.codec, Arena.make()) for name in names
        }

    def collect(self) -> int:
        """Everybody plays its share of an epoch; how many turns that were.

        Raises:
            UsageError: if the recipe needs weights that would have to be fetched.
        """
        turns = 0
        for learner in self.learners.values():
            while learner.samples < self._recipe.turns:
                brought = learner.collect(self._recipe.turns - learner.samples).samples
                if not brought and learner.samples < self._recipe.turns:
                    raise UsageError(
                        f"{self._recipe.name} waits for weights that a CID names, and nobody gives them here; "
                        "run it by `shoal recipe run`"
                    )
                turns += brought
        return turns

    def update(self) -> None:
        """One joint update.

        Raises:
            DivergedError: if it came to nothing.
        """
        updates = {name: learner.update() for name, learner in self.learners.items()}
        wanted: dict[PeerId, Exchange | Joint] = {}
        for name in updates:
            self._advance(name, updates[name], None, wanted)
        while wanted:
            given = []
            for name, each in wanted.items():
                data = self._merging[name].offer(each)
                if data is not None:
                    given.append(Given(name, each.weight, data))
            over = 0
            for name in list(wanted):
                rejected: list[PeerId] = []
                answer = self._merging[name].merge(given, rejected)
                if rejected:
                    raise DivergedError(f"{name} refuses what {', '.join(rejected)} gave")
                self._merging[name].settle(arrived=True)
                over += not self._advance(name, updates[name], answer, wanted)
            if wanted and over:
                raise DivergedError("some are done and others are not")
        self._epoch += 1
        if self._keys:
            before = self._state
            self._name_states()
            self._hand_on(before)

    def _name_states(self) -> None:
        """Tell all what the state that they hold is called."""
        first, *_ = self.learners.values()
        self._state = Cid.of_block(encode_arrays(first.export_state(), {}))
        for learner in self.learners.values():
            learner.holds(self._epoch, self._state)

    def _hand_on(self, state: Cid) -> None:
        """What was given in the epoch that is over, to all others that have use for it; in any order."""
        coming, self._coming = self._coming, []
        for name, learner in self.learners.items():
            left = UPDATES_TAKEN * self._most_foreign
            for number in self._rng.permutation(len(coming)).tolist():
                author, cid, data = coming[number]
                if left > 0 and name != author and author not in self._shunned[name]:
                    is_checked = bool(self._rng.random() < self._check_rate)
                    looked = learner.admit(Admit(data, cid, author, self._epoch, state, is_checked), self._epoch)
                    left -= looked.samples
                    self.findings.append((name, author, looked.finding))
                    if looked.finding.verdict is evidence.Verdict.FALSE:
                        self._shunned[name].add(author)

    def _advance(self, name: PeerId, update: AnyUpdate, answer: Any, wanted: dict[PeerId, Exchange | Joint]) -> bool:
        """Run one's update until it wants something averaged; whether it does."""
        try:
            asked = update.send(answer)
            while not isinstance(asked, Exchange | Joint):
                if isinstance(asked, Give):
                    given = self._tamper(name, asked)
                    cid, data = seal(self._keys[name], given.head, given.columns)
                    self._coming.append((name, cid, data))
                    asked = update.send(cid)
                    continue
                asked = update.send(self.board.answer(name, self._epoch, asked))
        except StopIteration:
            wanted.pop(name, None)
            return False
        wanted[name] = asked
        return True

    def probe(self, seed: int = 1) -> dict[str, float]:
        """The mean of what each says, by probe."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for peer, learner in self.learners.items():
            learner.evaluate(1, seed)
            self.board.sign(peer, self._epoch, learner.scores)
            for name, score in learner.scores.items():
                found[name].append(score)
        return {name: sum(scores) / len(scores) for name, scores in found.items()}


def play_locally(recipe: Recipe, count: int = 3, *, seed: int = 0, epochs: int | None = None) -> Report:
    """A whole run of a recipe by so many nodes in this process."""
    company = Company(recipe, peers(count), seed)
    epochs = recipe.epochs if epochs is None else epochs
    env_steps = 0
    scores: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for epoch in range(epochs + 1):
        if epoch:
            env_steps += company.collect()
            company.update()
        is_probed = epoch == 1 or epoch == epochs or (epoch and epoch % recipe.eval_interval == 0)
        for name, score in company.probe().items() if is_probed else ():
            scores[name].append((epoch, score))
    return Report({name: tuple(points) for name, points in scores.items()}, epochs, env_steps, 0.0, count)
