"""Shards of both kinds, what is said of them, and patches: whatever the bytes, no more is unpacked than was said.

An input is a letter and what follows it: ``s`` a shard as it is; ``h`` a shard's head, which is signed here, and
its columns' plain bytes, which are compressed here; ``c`` what a member signs of a shard;
``p`` a patch as it is; ``q`` a patch's head, and its plain gaps and values, which are compressed here. Signatures and
hashes of what is signed are what a stranger cannot make, so the target makes them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from random import Random
from typing import Any, Final

import msgpack
import numpy as np

from shoal.protocol.codec import decode, encode
from shoal.protocol.errors import ProtocolError
from shoal.protocol.ids import Cid
from shoal.protocol.signing import Signed
from shoal.training.rollouts import patches
from shoal.training.rollouts.evidence import CHECKED, Checked, Finding, Lie, Verdict, hear, say
from shoal.training.rollouts.packed import body_bytes, compress
from shoal.training.rollouts.rows import Rows, rows_of
from shoal.training.rollouts.shard import FORM, KIND, Head, Shard, ShardKind, open_shard, seal
from shoal.training.rollouts.takes import Part, PlayOf, columns_of, plays_of
from shoal.training.tasks.base import Continuous, Discrete
from shoal.training.tasks.cast import Learned
from shoal.training.tasks.play import Box, Role, Take, Text
from shoal.training.tasks.source import Scenario

from .harness import MutateBytes, Target, refusing, require, unless_refused
from .identities import ALICE, BOB, SWARM
from .mutators import mutate_packed, pack_steps, read_steps

_MAX_BYTES: Final = 256 * 1024
"""Of columns; smaller than usual, so that a little too much is seen."""
_STATE: Final = Cid.of_block(b"a policy")
_ROLES: Final = {
    "writer": Role(Text(64), Text(64)),
    "body": Role(Box(2), Discrete(3)),
    "arm": Role(Box(1), Continuous(2)),
}
_BASE: Final = np.arange(40, dtype=np.uint16)


def _run(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    match kind:
        case b"s":
            _run_shard(rest)
        case b"h":
            _run_shard(_shard_of(rest))
        case b"c":
            _run_said(encode(BOB.seal(CHECKED, rest)))
            _run_said(rest)
        case b"p":
            _run_patch(rest)
        case b"q":
            _run_patch(_patch_of(rest))


def _run_shard(data: bytes) -> None:
    shard = unless_refused(lambda: open_shard(data, swarm=SWARM, max_bytes=_MAX_BYTES), ProtocolError)
    if shard is None:
        return
    require(shard.author == ALICE.peer_id, "a shard was taken that its author did not sign")
    size = sum(column.nbytes for column in shard.columns.values())
    require(size <= _MAX_BYTES, "columns are larger than they may be")
    require(all(not column.flags.writeable for column in shard.columns.values()), "a shard can be written into")
    again = seal(ALICE, replace(shard.head, columns=(), digest=bytes(32)), shard.columns)[1]
    same = open_shard(again, swarm=SWARM)
    require(encode(same.head.columns) == encode(shard.head.columns), "a shard comes back with other columns")
    for space in (Discrete(2), Continuous(2)):
        with refusing(ProtocolError):
            _check_rows(rows_of(shard, 3, space), shard)
    with refusing(ProtocolError):
        _check_plays(plays_of(shard, _ROLES), shard)


def _check_rows(rows: Rows, shard: Shard) -> None:
    require(rows.samples == shard.head.samples, "a shard has other samples than it says")
    require(np.isfinite(rows.rewards).all() and np.isfinite(rows.log_probs).all(), "rows hold what is not finite")
    if rows.actions.dtype == np.int64:
        require(((rows.actions >= 0) & (rows.actions < 2)).all(), "rows have actions that there are not")


def _check_plays(plays: list[PlayOf], shard: Shard) -> None:
    takes = [part.take for play in plays for part in play.parts]
    require(sum(map(len, takes)) == shard.head.samples, "a shard has other acts than it says")
    for take in takes:
        require(len(take.rewards) == len(take.log_probs) == len(take), "a take's columns are not of one length")
        require(not take.sights or len(take.sights) == len(take), "a take saw more or less than it did")
    again = columns_of(plays, _ROLES, with_sights="sights" in shard.columns)
    require(again["acts"].tobytes() == shard.columns["acts"].tobytes(), "acts come back changed")


def _shard_of(rest: bytes) -> bytes:
    """A shard that Alice signed, of a head and plain columns."""
    steps = read_steps(rest)
    if len(steps) < 2:
        return rest
    told, raw = steps[0][1], steps[1][1]
    head = unless_refused(lambda: decode(Head, told, strict=True), ProtocolError)
    if head is not None and body_bytes(head.columns) <= _MAX_BYTES:  # as many bytes as it says, to get further
        size = body_bytes(head.columns)
        raw = (raw * (1 + size // max(1, len(raw))))[:size]
    body = compress(raw)
    if head is not None:
        told = encode(replace(head, digest=hashlib.sha256(body).digest()))
    sealed = encode(ALICE.seal(KIND, told))
    return FORM + len(sealed).to_bytes(4, "little") + sealed + body


def _run_said(data: bytes) -> None:
    with refusing(ProtocolError):
        said = hear(data, SWARM)
        require(said.by == BOB.peer_id, "somebody's word was taken that it did not sign")
        if said.checked.verdict is Verdict.FALSE:
            require(said.author == ALICE.peer_id, "somebody is accused of what it did not sign")


def _run_patch(data: bytes) -> None:
    head = unless_refused(lambda: patches.head_of(data), ProtocolError)
    if head is None:
        return
    with refusing(ProtocolError, patches.MissingBaseError):
        words = patches.apply(_BASE, data, _BASE.size)
        require(words.shape == _BASE.shape and words.dtype == np.uint16, "a patch leads to no copy")
        require(patches.digest_of(words) == head.digest, "a patch leads to another copy than it names")


def _patch_of(rest: bytes) -> bytes:
    """A patch of a head, plain gaps and plain values."""
    steps = read_steps(rest)
    if len(steps) < 3:
        return rest
    gaps, values = (compress(step[1]) if step[1] else b"" for step in steps[1:3])
    try:
        plain = msgpack.unpackb(steps[0][1])
        plain["gaps"] = len(gaps)
        told = msgpack.packb(plain)
    except (ValueError, TypeError, msgpack.UnpackException):
        told = steps[0][1]
    return patches.FORM + len(told).to_bytes(4, "little") + told + gaps + values


def _head(kind: ShardKind, samples: int) -> Head:
    return Head(
        kind=kind,
        swarm=SWARM,
        task="gym:CartPole-v1",
        version=3,
        state=_STATE,
        stream=1,
        number=1,
        before=_STATE,
        samples=samples,
        surroundings=bytes(16),
    )


def _rows(discrete: bool, is_shown: bool) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    one, space = ((), Discrete(2)) if discrete else ((2,), Continuous(2))
    actions: Any = rng.integers(2, size=(3, 2)) if discrete else rng.random((3, 2, *one), np.float32)
    truncated = np.array([[False, True], [False, False], [False, False]])
    return Rows(
        seeds=np.array([7, 8]),
        lead=actions[:1],
        actions=actions,
        rewards=rng.random((3, 2), np.float32),
        log_probs=-rng.random((3, 2), np.float32),
        terminated=np.zeros((3, 2), np.bool_),
        truncated=truncated,
        sights=rng.random((4, 2, 3), np.float32) if is_shown else None,
        finals=rng.random((1, 3), np.float32) if is_shown else None,
    ).columns(space)


def _plays() -> list[PlayOf]:
    found = []
    for number in range(2):
        scenario = Scenario(number, {"level": [1, "x"]}, (1, "a", np.ones(2, np.float32)), 7, "tag")
        writer, body, arm = (Take(name, role, Learned("x"), scenario, number) for name, role in _ROLES.items())
        for take, sight, act in (
            (writer, "what?", "é"),
            (body, np.zeros(2, np.float32), 2),
            (arm, np.ones(1, np.float32), np.ones(2, np.float32)),
        ):
            take.sights.append(sight)
            take.acts.append(act)
            take.rewards.append(0.5)
            take.log_probs.append(-1.0)
        writer.cut, writer.final = True, "end"
        found.append(PlayOf(scenario, tuple(Part(take, (None,)) for take in (writer, body, arm))))
    return found


def _seeds() -> list[bytes]:
    rows = [(_head(ShardKind.ROWS, 6), _rows(*each)) for each in ((True, False), (True, True), (False, True))]
    takes = [(_head(ShardKind.TAKES, 6), columns_of(_plays(), _ROLES, with_sights=each)) for each in (False, True)]
    whole = [seal(ALICE, head, columns)[1] for head, columns in (*rows, *takes)]
    opened = [open_shard(data) for data in whole]
    split = []
    for shard, (_, columns) in zip(opened, (*rows, *takes), strict=True):
        plain = b"".join(_planes(columns[each.name]) for each in shard.head.columns)
        split.append(pack_steps([(0, encode(shard.head)), (0, plain)]))
    false = say(BOB, opened[0], Finding(Verdict.FALSE, "", Lie.REWARDS, 1, 1)) or b""
    true = encode(Checked(swarm=SWARM, shard=opened[0].cid, verdict=Verdict.TRUE))
    changed = _BASE.copy()
    changed[::9] += 1
    patch, key = patches.patch_of(_BASE, changed, 1), patches.key_of(changed, 1)
    head = patches.PatchHead(
        kind=patches.PatchKind.SPARSE,
        version=1,
        words=_BASE.size,
        base=patches.digest_of(_BASE),
        digest=patches.digest_of(changed),
        changed=5,
        gap_bytes=1,
        value_bytes=1,
        gaps=1,
    )
    parts = pack_steps([(0, encode(head)), (0, bytes([0, 8, 8, 8, 8])), (0, bytes([2] * 5))])
    return [
        *(b"s" + each for each in whole),
        *(b"h" + each for each in split),
        b"c" + decode(Signed, false).payload,
        b"c" + false,
        b"c" + true,
        *(b"p" + each for each in (patch, key)),
        b"q" + parts,
    ]


def _planes(array: Any) -> bytes:
    """As a body has it."""
    flat = np.ascontiguousarray(array)
    return flat.reshape(-1).view(np.uint8).reshape(-1, flat.itemsize).T.tobytes() if flat.size else b""


def _mutate(data: bytes, max_bytes: int, rng: Random, mutate_bytes: MutateBytes) -> bytes:
    kind = data[:1]
    if kind in (b"h", b"q") and rng.random() < 0.9:
        steps = read_steps(data[1:])
        if steps:
            at = 0 if rng.random() < 0.6 else rng.randrange(len(steps))
            what, with_bytes = steps[at]
            change = mutate_packed if at == 0 else lambda each, most, _, by: by(each, most)
            steps[at] = what, change(with_bytes, max_bytes // 2, rng, mutate_bytes)[: 2**16 - 1]
            return kind + pack_steps(steps)
    if kind == b"c" and rng.random() < 0.9:
        return kind + mutate_packed(data[1:], max_bytes - 1, rng, mutate_bytes)
    if rng.random() < 0.05:
        return rng.choice((b"s", b"h", b"c", b"p", b"q")) + mutate_bytes(data[1:], max_bytes - 1)
    return kind + mutate_bytes(data[1:], max_bytes - 1)


TARGET: Final = Target(
    run=_run, seeds=_seeds, mutate=_mutate, max_peak_bytes=lambda length: 4 * 1024 * 1024 + 256 * length
)
