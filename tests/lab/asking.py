"""Scenarios of plays that wait for another node: far away, behind a relay, and dead.

Each takes the `Stage` to play on.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any, Final

from shoal.cli.spawn import kill_tree
from shoal.node.api.client import Client

from .nodes import LabNode
from .stage import Stage, path_to, wait_for_path, wait_until

PROMPTS: Final = 16
PLAYS: Final = 8
SETTINGS: Final[dict[str, Any]] = {
    "policies.large.warm.max_steps": 5,
    "policies.small.warm.max_steps": 5,
    "source.per_epoch": PROMPTS,
    "source.plays": PLAYS,
    "plays": PROMPTS * PLAYS,
    "probes.right.source.per_epoch": 16,
    "probes.tokens.source.per_epoch": 16,
}
SECONDS: Final = 30
AFTER_S: Final = 30.0
"""After the one who answers is gone, an epoch has to end within this: two deadlines of ten seconds, and its work."""


def consult(stage: Stage) -> None:
    """Dialogues between nodes 50 ms apart, each reached directly; then the one who answers is killed."""
    _, large, _, small = stage.pair("open")
    _talk(stage, large, small, "direct", is_killed=True)


def consult_relayed(stage: Stage) -> None:
    """The same over a relay, as nothing else leads there; and the one who answers falls silent."""
    _, large, _, small = stage.pair("symmetric", "--no-webrtc")
    _talk(stage, large, small, "relayed", is_killed=False)


def _talk(stage: Stage, large: LabNode, small: LabNode, path: str, *, is_killed: bool) -> None:
    with large.client() as at_large, small.client() as at_small:
        at_large.ping(small.peer_id)
        wait_for_path(at_large, small.peer_id, path)
        words = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
        sizes = ("--batch-per-learner", str(4 * PROMPTS * PLAYS), "--eval-interval", "1000", "--min-learners", "2")
        created = json.loads(
            large.run("swarm", "create", "--task", "recipe:hawkeye", "--part", "large", *sizes, *words, "--json")
        )
        swarm = created["swarm"]
        small.run("join", created["ticket"], "--part", "small", "--detach")
        wait_until("they play together", lambda: at_large.swarm(swarm).epoch >= 5, 120)
        before, asked, began = at_large.swarm(swarm).epoch, _answered(at_small), time.monotonic()
        time.sleep(SECONDS)
        took_s, dialogues = time.monotonic() - began, (at_large.swarm(swarm).epoch - before) * PROMPTS * PLAYS
        calls = _answered(at_small) - asked
        stage.equal("the path meanwhile", path_to(at_large, small.peer_id), path)
        stage.say(f"  {dialogues} dialogues in {took_s:.0f} s, by {calls} questions to the other node")
        stage.at_least("dialogues that another node takes part in", round(dialogues * 60 / took_s), 60, "a minute")
        stage.at_least("questions that it answered", calls, 1)
        pid = at_small.node().pid
        if is_killed:
            kill_tree(pid)
        else:
            os.kill(pid, signal.SIGSTOP)
        worst_s = 0.0
        for _ in range(5):
            epoch = at_large.swarm(swarm).epoch
            worst_s = max(worst_s, wait_until("an epoch", lambda: at_large.swarm(swarm).epoch > epoch, 2 * AFTER_S))  # noqa: B023  called at once
        how = "killed" if is_killed else "stopped without a word"
        stage.within(f"the longest epoch after that node was {how}", worst_s, AFTER_S)
        if not is_killed:
            os.kill(pid, signal.SIGCONT)
        stage.equal("its error", at_large.swarm(swarm).error, None)


def _answered(client: Client) -> int:
    served = client.metrics().served.get("swarm.consult")
    return 0 if served is None else served.calls
