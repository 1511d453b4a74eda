"""Whether a shard is true: found out by doing it again.

Rows are replayed from their seeds and acts. Rewards, ends and sights must be the same bits; acts must be those that the
policy and the committed noise ask for, and log-probabilities those of the policy, by no more than rounding can explain
(`shoal.training.rollouts.acting`). Takes are played again, their rewards scored again by the game, and their tokens
drawn again from the committed seed: with Gumbel noise that both know, a token is the argmax of log-probability plus
noise, up to rounding (DiFR, arXiv 2511.20621, which compares the same margin).

Findings are of four kinds (`shoal.training.rollouts.evidence`); only what is false is held against anybody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.protocol.codec import encode
from shoal.protocol.errors import LimitError, ProtocolError
from shoal.protocol.ids import PeerId
from shoal.training.rollouts.acting import Acting, Noise, NoiseOfOne
from shoal.training.rollouts.evidence import Finding, Lie, Verdict
from shoal.training.rollouts.replaying import CannotReplayError, Replayed, again, replay
from shoal.training.rollouts.rows import DoesNotFitError, Rows, rows_of
from shoal.training.rollouts.shard import (
    Head,
    Shard,
    noise_seed,
    seeds_of,
)
from shoal.training.rollouts.takes import Drawn, Part, PlayOf, plays_of
from shoal.training.tasks import Task
from shoal.training.tasks.play import BadScenarioError, Game, Take
from shoal.training.tasks.playing import Played
from shoal.training.tasks.source import Scenario

_ROWS: Final = 4096  # judged at once

_TRUE: Final = Finding(Verdict.TRUE)


class Judge(Protocol):
    """A language model, as far as whoever checks its tokens needs it."""

    vocabulary: int
    """How many tokens there are; each is a number below it."""
    longest: int
    """The most tokens that an act may have, its end among them."""
    slack: float
    """How far rounding may lead a token's log-probability; that of a small transformer in float32 is some 1e-5."""

    def log_probs(self, take: Take, act: int, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """``[n, vocabulary]``, of every token at each place of an act, given all before; -inf of what is not allowed.

        Args:
            take: with its sights.
            act: its number in the take.
            tokens: int32 ``[n]``, that were drawn.
        """
        ...

    def text(self, tokens: npt.NDArray[np.int32]) -> str | None:
        """What they say; None: no act is made of these tokens."""
        ...


# --- rows ------------------------------------------------------------------------------------------------------------


def check_rows(
    shard: Shard,
    task: Task,
    surroundings: bytes,
    acting: Acting | None,
    *,
    before: Rows | None = None,
    until: int | None = None,
    env: int | None = None,
) -> Finding:
    """Look into a shard of rows.

    It costs one replay, and one pass through the policy and its bound for all steps at once. One environment of N costs
    about an N-th, and finds what is false in all of them as well.

    Args:
        shard: as it was opened.
        task: the manifest's.
        surroundings: of that task here.
        acting: the copy of the policy that the shard names; None, if it is not here.
        before: the rows of the shard that it says it follows; None: what led to its beginning is believed.
        until: how many of its steps to look at; None: all.
        env: which of its environments to look at; None: all.
    """
    head = shard.head
    if head.task != task.name or head.surroundings != surroundings:
        return Finding(Verdict.DOES_NOT_FIT, "it was made of another task, or where the same task shows other numbers")
    try:
        rows = rows_of(shard, task.observation_space.size, task.action_space)
    except (DoesNotFitError, LimitError) as error:
        return Finding(Verdict.DOES_NOT_FIT, str(error))
    except ProtocolError as error:
        return Finding(Verdict.FALSE, str(error), Lie.FORM)
    if rows.seeds.tolist() != seeds_of(head.swarm, shard.author, head.policy, head.stream, rows.num_envs):
        return Finding(Verdict.FALSE, "its seeds are not those of its author and stream", Lie.SEEDS)
    found = _check_lead(head, rows, before)
    if found is not _TRUE:
        return found
    noise, first = Noise(noise_seed(shard.author, head)), 0
    if env is not None:
        noise, first = NoiseOfOne(noise, env, rows.num_envs), env
        rows = rows.of_envs((env,))
    try:
        replayed = replay(rows, task.make, until=until)
    except CannotReplayError as error:
        return Finding(Verdict.CANNOT_BE_HAD, str(error))
    found = _compare(rows, replayed, first)
    if found is not _TRUE:
        return found
    if acting is None:
        return Finding(Verdict.CANNOT_BE_HAD, f"the policy {head.state} is not here; fetch it")
    found = _check_acts(rows, replayed.sights[:-1], acting, noise, first)
    if found is not _TRUE:
        return found
    if env is not None:  # of the others nothing is known, so that nobody can be said to lie about them
        return Finding(Verdict.TRUE)
    looked = frozenset(Lie) - {Lie.DRAWS} - ({Lie.LEAD} if before is None and head.number else set())
    return Finding(Verdict.TRUE, looked=looked, seen=len(replayed.rewards))


def _check_lead(head: Head, rows: Rows, before: Rows | None) -> Finding:
    if head.number == 0 and len(rows.lead):
        return Finding(Verdict.FALSE, "the first shard of a stream follows acts of nobody", Lie.LEAD)
    if before is None:
        return _TRUE
    led = np.concatenate([before.lead, before.actions])
    if led.shape == rows.lead.shape and led.tobytes() == rows.lead.tobytes():
        return _TRUE
    return Finding(Verdict.FALSE, "it does not follow the shard that it says it follows", Lie.LEAD)


def _compare(rows: Rows, replayed: Replayed, first_env: int) -> Finding:
    steps = len(replayed.rewards)
    claims: list[tuple[Lie, Any, Any]] = [
        (Lie.ENDS, rows.terminated[:steps], replayed.terminated),
        (Lie.ENDS, rows.truncated[:steps], replayed.truncated),
        (Lie.REWARDS, rows.rewards[:steps], replayed.rewards),
    ]
    if rows.sights is not None:
        claims.append((Lie.SIGHTS, rows.sights[: steps + 1], replayed.sights))
    first: tuple[int, int, Lie] | None = None
    for lie, claimed, true in claims:
        apart = claimed != true
        places = np.argwhere(apart.any(axis=-1) if apart.ndim == 3 else apart)
        if len(places) and (first is None or places[0][0] < first[0]):
            first = int(places[0][0]), int(places[0][1]), lie
    if first is not None:
        step, env, lie = first[0], first_env + first[1], first[2]
        return Finding(Verdict.FALSE, f"environment {env} had other {lie} at step {step}", lie, step, env)
    if rows.finals is not None and steps == rows.steps and rows.finals.tobytes() != replayed.finals.tobytes():
        return Finding(Verdict.FALSE, "what episodes showed last is something else", Lie.SIGHTS)
    return _TRUE


def _check_acts(rows: Rows, sights: npt.NDArray[np.float32], acting: Acting, noise: Noise, first_env: int) -> Finding:
    steps, count = sights.shape[:2]
    seen = sights.reshape(steps * count, -1)
    actions = rows.actions[:steps].reshape(steps * count, *rows.actions.shape[2:])
    claimed = rows.log_probs[:steps].reshape(-1)
    for start in range(0, len(seen), _ROWS):
        part = slice(start, start + _ROWS)
        with np.errstate(all="ignore"):  # of a policy that is nonsense
            expected = acting.expected(seen[part], actions[part], noise)
            is_other = ~(expected.missed <= expected.allowed)
            is_edited = ~(np.abs(claimed[part] - expected.log_probs) <= expected.slack)
        wrong = np.flatnonzero(is_other | is_edited)
        if len(wrong):
            step, env = divmod(start + int(wrong[0]), count)
            env += first_env
            lie = Lie.ACTS if is_other[wrong[0]] else Lie.LOG_PROBS
            share = len(wrong) / len(claimed[part])
            words = (
                f"environment {env} had other {lie} at step {step} by this policy and its seed ({share:.0%} of them)"
            )
            return Finding(Verdict.FALSE, words, lie, step, env)
    return _TRUE


# --- takes -----------------------------------------------------------------------------------------------------------


def check_takes(
    shard: Shard,
    game: Game,
    *,
    task: str,
    scenarios: Sequence[Scenario] | None = None,
    judges: Mapping[str, Judge | None] | None = None,
    until: int | None = None,
) -> Finding:
    """Look into a shard of takes: what each play earned, and by whom its tokens were drawn.

    Args:
        shard: as it was opened.
        game: the manifest's.
        task: the manifest's.
        scenarios: that its author had to play, in this order; None: any.
        judges: by role, the policy that the shard names, for roles whose acts were drawn token by token; None: it is
            not here. Roles that are not named are believed.
        until: how many of its plays to look at; None: all.
    """
    try:
        plays = plays_of(shard, game.roles)
    except (DoesNotFitError, LimitError) as error:
        return Finding(Verdict.DOES_NOT_FIT, str(error))
    except ProtocolError as error:
        return Finding(Verdict.FALSE, str(error), Lie.FORM)
    return check_plays(shard, plays, game, task=task, scenarios=scenarios, judges=judges, until=until)


def check_plays(
    shard: Shard,
    plays: Sequence[PlayOf],
    game: Game,
    *,
    task: str,
    scenarios: Sequence[Scenario] | None = None,
    judges: Mapping[str, Judge | None] | None = None,
    until: int | None = None,
    redrawn: Collection[int] | None = None,
    count: Callable[[str], int] | None = None,
) -> Finding:
    """The same of a shard whose plays were read; their takes hold what they were shown when it comes out as true.

    Args:
        shard: as it was opened.
        plays: of it.
        game: likewise, as what follows, see `check_takes`.
        task: likewise.
        scenarios: likewise.
        judges: likewise.
        until: likewise.
        redrawn: the numbers of the plays whose tokens are drawn again, which costs a pass through the policy for each
            act, where a score often costs nothing; None: all.
        count: how many tokens a text has, its end among them: longer ones than the game asks for are false. None: that
            is not looked at.
    """
    if shard.head.task != task:
        return Finding(Verdict.DOES_NOT_FIT, "it was made of another task")
    if scenarios is not None and [_key(play.scenario) for play in plays] != [_key(each) for each in scenarios]:
        return Finding(Verdict.FALSE, "its scenarios are not those that its author had to play", Lie.SEEDS)
    missing: Finding | None = None
    for number, play in enumerate(plays[:until]):
        found, limits = _check_play(game, play, number)
        if found.verdict is Verdict.TRUE and count is not None:
            found = _check_lengths(play, limits, number, count)
        if found.verdict is Verdict.FALSE:
            return found
        for part in play.parts if redrawn is None or number in redrawn else ():
            if found.verdict is Verdict.TRUE:
                found = _check_tokens(shard, part, number, limits[part.take.role], judges or {})
            if found.verdict is Verdict.FALSE:
                return found
        if found.verdict is not Verdict.TRUE:
            missing = found
    if missing is not None:
        return missing
    seen = plays if until is None else plays[:until]
    are_judged = all(part.take.role in (judges or {}) for play in seen for part in play.parts if part.take.proven)
    looked = {Lie.FORM, Lie.ENDS, Lie.REWARDS, Lie.SIGHTS, Lie.ACTS}
    looked |= set() if scenarios is None else {Lie.SEEDS}
    looked |= {Lie.DRAWS, Lie.LOG_PROBS} if are_judged and redrawn is None else set()
    return Finding(Verdict.TRUE, looked=frozenset(looked), seen=len(seen))


_Limits: TypeAlias = Mapping[str, Sequence[int | None]]


def _check_play(game: Game, play: PlayOf, number: int) -> tuple[Finding, _Limits]:
    """What is found of all but its tokens; and how long each act of each role might be."""
    try:
        replayed = again(game, play)
    except BadScenarioError as error:
        return Finding(Verdict.FALSE, str(error), Lie.ACTS, 0, number), {}
    except Exception as error:
        return Finding(Verdict.CANNOT_BE_HAD, f"the game failed here: {type(error).__name__}"), {}
    return _compare_plays(play, replayed.played, number), replayed.limits


def _check_lengths(play: PlayOf, limits: _Limits, number: int, count: Callable[[str], int]) -> Finding:
    for part in play.parts:
        for act, (said, most) in enumerate(zip(part.take.acts, limits[part.take.role], strict=True)):
            if isinstance(said, str) and most is not None and count(said) > most + 1:
                words = f"{part.take.role} said more than the {most} tokens that it was asked for"
                return Finding(Verdict.FALSE, words, Lie.FORM, act, number)
    return _TRUE


def _compare_plays(play: PlayOf, played: Played, number: int) -> Finding:
    replayed = {take.role: take for take in played.takes}
    for part in play.parts:
        claimed, true = part.take, replayed.get(part.take.role)
        if true is None or len(true) != len(claimed):
            return Finding(Verdict.FALSE, f"{claimed.role} acted another number of times", Lie.ACTS, 0, number)
        if claimed.cut != true.cut:
            return Finding(
                Verdict.FALSE, f"the play of {claimed.role} ended otherwise", Lie.ENDS, len(true) - 1, number
            )
        earned = np.array([true.early, *true.rewards], np.float32)
        apart = np.flatnonzero(np.array([claimed.early, *claimed.rewards], np.float32) != earned)
        if len(apart):
            step = max(0, int(apart[0]) - 1)
            return Finding(
                Verdict.FALSE, f"{claimed.role} earned something else at act {step}", Lie.REWARDS, step, number
            )
        found = _compare_sights(claimed, true, number)
        if found is not _TRUE:
            return found
        claimed.sights, claimed.final = true.sights, true.final  # whoever judges tokens needs them
    return _TRUE


def _compare_sights(claimed: Take, true: Take, number: int) -> Finding:
    if not claimed.sights:
        return _TRUE
    for step, (left, right) in enumerate(
        zip([*claimed.sights, claimed.final], [*true.sights, true.final], strict=True)
    ):
        is_same = left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else left == right
        if not is_same:
            return Finding(Verdict.FALSE, f"{claimed.role} was shown something else", Lie.SIGHTS, step, number)
    return _TRUE


def _check_tokens(
    shard: Shard, part: Part, number: int, limits: Sequence[int | None], judges: Mapping[str, Judge | None]
) -> Finding:
    role = part.take.role
    if role not in judges or not part.take.proven:
        return _TRUE
    judge = judges[role]
    if judge is None:
        return Finding(Verdict.CANNOT_BE_HAD, f"the policy {shard.head.state} is not here; fetch it")
    for act, drawn in enumerate(part.drawn):
        if drawn is None:
            return Finding(Verdict.FALSE, f"{role} does not say what it drew", Lie.DRAWS, act, number)
        part.take.max_tokens = limits[act]
        lie = _redrawn(shard, part.take, act, drawn, number, judge)
        if lie is not None:
            return Finding(Verdict.FALSE, f"{role} drew something else at act {act}", lie, act, number)
    return _TRUE


def _redrawn(shard: Shard, take: Take, act: int, drawn: Drawn, play: int, judge: Judge) -> Lie | None:
    """What is false about the tokens of an act."""
    if len(drawn.tokens) > judge.longest or drawn.tokens.min() < 0 or drawn.tokens.max() >= judge.vocabulary:
        return Lie.FORM
    if judge.text(drawn.tokens) != take.acts[act]:
        return Lie.DRAWS
    log_probs = judge.log_probs(take, act, drawn.tokens)
    scores = log_probs + token_noise(shard.author, shard.head, play, take.role, act).gumbel(log_probs.shape)
    rows = np.arange(len(drawn.tokens))
    if not (scores[rows, drawn.tokens] >= scores.max(axis=1) - 2 * judge.slack).all():
        return Lie.DRAWS
    chosen = log_probs[rows, drawn.tokens]
    says = np.abs(drawn.log_probs - chosen) <= judge.slack
    total = abs(take.log_probs[act] - float(chosen.sum())) <= judge.slack * len(rows)
    return None if bool(says.all()) and total else Lie.LOG_PROBS


def token_noise(author: PeerId, head: Head, play: int, role: str, act: int) -> Noise:
    """The chance by which the tokens of one act are drawn, whatever else was drawn beside it.

    It follows from the policy and from what is played, and not from the shard: who begins an epoch again, or another
    stream, has the same luck as before.

    Args:
        author: who acts.
        head: of the shard; its policy, version and state count.
        play: the number of the play among those of its author in this version.
        role: who acts in it.
        act: the number of the act in its take.
    """
    told = ["shoal tokens", head.swarm, author, head.policy, head.version, head.state, play, act, role]
    return Noise(int.from_bytes(hashlib.sha256("\n".join(map(str, told)).encode()).digest()[:16], "big"))


def _key(scenario: Scenario) -> bytes:
    acts = [act.tobytes() if isinstance(act, np.ndarray) else act for act in scenario.acts]
    return encode([scenario.seed, dict(scenario.params), acts, scenario.max_turns, scenario.tag])
