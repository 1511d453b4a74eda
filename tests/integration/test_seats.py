"""Seats of others in games of real nodes: a person, another framework, weights that a CID names."""

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.node.api.client import Client
from shoal.node.api.requests import AnswerAsk
from shoal.protocol.errors import UsageError
from shoal.training.keeper import descendants

from .conftest import SHOAL

SMALL = ("--batch-per-learner", "12", "--max-env-steps", "1000000")
RECIPES = {"person": "WITH_PERSON", "foreign": "WITH_FOREIGN", "fixed": "WITH_FIXED"}


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).with_name("seated_games.py"), site)
    about = site / "seated_games-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: seated_games\nVersion: 1\n")
    recipes = "".join(f"duel-{name} = seated_games:{where}\n" for name, where in RECIPES.items())
    (about / "entry_points.txt").write_text(f"[shoal.recipes]\n{recipes}[shoal.seats]\nthrees = seated_games:threes\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
        yield


def consults(shown: dict[str, Any]) -> dict[str, Any]:
    return shown["consults"].get("guest", {"asked": 0, "answered": 0, "fell_back": 0})


def test_a_person_plays_in_the_game_of_another_node_and_plays_go_on_when_they_get_up(make_node):
    host, guest = make_node(), make_node()
    options = ("--task", "recipe:duel-person", "--part", "peer", "--min-learners", "2", "--eval-interval", "1000")
    created = host.ask("swarm", "create", *options, *SMALL)
    swarm = created["swarm"]
    guest.ask("join", created["ticket"], "--part", "guest", "-d")
    with Client(guest.config.paths, guest.profile) as client:
        seen = []
        while len(seen) < 6:
            for ask in client.asks(swarm, 30.0):
                assert (ask.peer, ask.role, ask.legal) == (host.peer_id, "player_1", [2, 3])
                assert len(ask.sight) == 2
                if not seen:
                    with pytest.raises(UsageError, match=r"act 4 is not legal now; answer with one of 2, 3"):
                        client.answer_ask(swarm, AnswerAsk(id=ask.id, act=4))
                    with pytest.raises(UsageError, match=r"not a whole number"):
                        client.answer_ask(swarm, AnswerAsk(id=ask.id, act="two"))
                client.answer_ask(swarm, AnswerAsk(id=ask.id, act=2))
                seen.append(ask.id)
        with pytest.raises(UsageError, match="nobody waits for an answer"):
            client.answer_ask(swarm, AnswerAsk(id=seen[-1], act=2))
    assert len(set(seen)) == len(seen)
    shown = host.wait_for(swarm, "answers arrive", lambda shown: consults(shown)["answered"] >= 5)
    # The person has got up: nothing hangs.
    epoch = shown["epoch"]
    shown = host.wait_for(
        swarm, "it goes on", lambda shown: shown["epoch"] >= epoch + 3 and consults(shown)["fell_back"] > 0
    )
    tally = consults(shown)
    assert tally["asked"] == tally["answered"] + tally["unanswered"]
    # And sits down again, by the command.
    command = [*SHOAL, "sit", swarm, "--json", "--profile", guest.profile]
    sitting = subprocess.Popen(
        command, env=guest.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    answered = 0
    try:
        sitting.stdin.write("nonsense\n")
        for line in sitting.stdout:
            said = json.loads(line)
            if "role" in said:
                sitting.stdin.write(json.dumps({"id": said["id"], "act": 3}) + "\n")
            elif said["accepted"]:
                answered += 1
            else:
                assert said["error"]
            if answered == 3:
                break
    finally:
        sitting.kill()
        sitting.communicate()
    assert answered == 3
    token = host.config.paths.api_token.read_text()
    request = urllib.request.Request(host.info["api"] + "/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    assert f'shoal_consults_answered_total{{swarm="{swarm}",part="guest"}}' in text
    assert 'shoal_calls_total{side="called",method="swarm.consult"}' in text


def test_another_framework_plays_in_a_run_and_is_started_anew_when_it_is_killed(make_node):
    node = make_node()
    created = node.ask("swarm", "create", "--task", "recipe:duel-foreign", "--eval-interval", "1", *SMALL)
    swarm = created["swarm"]
    shown = node.wait_for(swarm, "it is played", lambda shown: shown["epoch"] >= 3 and shown["scores"])
    assert {entry["scores"]["said"] for entry in shown["scores"]} == {3.0}

    def hosts() -> list[int]:
        return [pid for pid in descendants(int(node.info["pid"])) if b"seat_host" in command_of(pid)]

    before = hosts()
    assert len(before) == 1
    os.kill(before[0], signal.SIGKILL)
    epoch = shown["epoch"]
    shown = node.wait_for(swarm, "it goes on", lambda shown: shown["epoch"] >= epoch + 4)
    assert shown["error"] is None
    assert {entry["scores"]["said"] for entry in shown["scores"][-2:]} == {3.0}
    assert hosts() != before
    node.run("leave", swarm)
    assert not hosts()


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_weights_of_an_earlier_run_are_fetched_and_play_and_what_nobody_has_is_waited_for(make_node):
    first = make_node()
    run = first.ask(
        "swarm", "create", "--task", "recipe:duel-foreign", "--batch-per-learner", "12", "--max-env-steps", "36"
    )
    ended = first.wait_for(run["swarm"], "it ends", lambda shown: shown["phase"] == "done")
    second = make_node("--bootstrap", first.info["addresses"][0])
    second.wait_until_connected()

    def create(recipe: str, *settings: str) -> str:
        words = ("--task", f"recipe:{recipe}", "--eval-interval", "1000", *SMALL)
        swarm: str = second.ask("swarm", "create", *words, *settings)["swarm"]
        return swarm

    cid = ended["policy_cid"]
    paths = ("cast.seat.cid", "probes.said.cast.seat.cid")
    found = create("duel-fixed", *(word for path in paths for word in ("--set", f"{path}={cid}")))
    shown = second.wait_for(found, "they play", lambda shown: shown["epoch"] >= 2)
    assert shown["error"] is None
    second.run("leave", found)
    lacking = create("duel-fixed")
    shown = second.wait_for(lacking, "it says what is lacking", lambda shown: shown["error"])
    assert "which nobody gives" in shown["error"]
    assert "nothing is played until it is here" in shown["error"]
    assert shown["epoch"] == 0
    second.run("leave", lacking)
    other = create("duel-fixed", "--set", f"cast.seat.cid={run['swarm']}", "--set", f"probes.said.cast.seat.cid={cid}")
    shown = second.wait_for(other, "it is refused", lambda shown: shown["phase"] == "failed")
    assert run["swarm"] in shown["error"]
