"""`shoal task` tells what can be learned; an environment's arguments are known, short, and no paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from shoal.cli import main
from shoal.cli.common import env_arguments
from shoal.protocol.errors import UsageError
from shoal.protocol.signing import Signer
from shoal.training.env_arguments import check_arguments
from shoal.training.manifest import Manifest, open_manifest, sign_manifest
from shoal.training.tasks import Continuous, Discrete, load_task
from shoal.training.tasks.failures import TaskFailedError

ANN = Signer(b"a" * 32)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main.run(["task", *arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in told(capsys, "ls")}
    assert list(rows["gym:CartPole-v1"]) == ["name", "summary", "target_return", "max_episode_steps", "needs"]
    assert rows["gym:CartPole-v1"]["target_return"] == 475
    assert rows["gym:CartPole-v1"]["max_episode_steps"] == 500
    assert rows["gym:CartPole-v1"]["needs"] == ""
    assert "gym:CartPole-v0" not in rows
    assert "recipe:hammer" in rows
    assert all(row["summary"] for row in rows.values())
    assert {row["name"] for row in told(capsys, "ls", "cartpole")} == {"gym:CartPole-v1"}
    assert main.run(["task", "ls", "no such thing"]) == 0
    assert "shows all" in capsys.readouterr().out


def test_each_game_is_listed_once_by_the_name_under_which_it_gets_its_frames() -> None:
    pytest.importorskip("ale_py", reason="the atari extra brings it")
    names = [row["name"] for row in load_task("gym:CartPole-v1").listed()]  # type: ignore[attr-defined]
    assert [name for name in names if "Pong" in name] == ["gym:ALE/Pong-v5"]


@pytest.mark.parametrize("words", [["task", "ls"], ["algorithm", "ls"], ["recipe", "ls"], ["recipe", "show", "rlccf"]])
def test_listing_loads_no_torch(words: list[str]) -> None:
    """It takes seconds; in a process of its own, where nothing else has loaded it."""
    program = "import sys; from shoal.cli import main; print(main.run(sys.argv[1:]), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program, *words, "--json"], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 False"


def test_what_is_missing_is_told_before_anybody_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.training.tasks.registry._MODULES", {"gymnasium.envs.toy_text": ("no_such", "tasks")})
    rows = {row["name"]: row["needs"] for row in load_task("gym:CartPole-v1").listed()}  # type: ignore[attr-defined]
    assert rows["gym:FrozenLake-v1"] == "pip install 'shoal[tasks]'"
    assert rows["gym:CartPole-v1"] == ""


def test_one_tells_its_spaces_its_limits_and_what_it_can_be_made_with(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", "gym:FrozenLake-v1", "--env-set", "map_name=8x8", "--env-set", "is_slippery=false")
    assert shown["observation"] == {"seen_as": "64 numbers", "space": "Discrete(64)"}
    assert shown["action"] == {"acts_by": "one of 4", "space": "Discrete(4)"}
    assert shown["arguments"]["is_slippery"] is True
    assert shown["max_episode_steps"] == 100
    assert "TimeLimit" in shown["wrappers"]
    assert main.run(["task", "show", "gym:FrozenLake-v1"]) == 0
    shown = capsys.readouterr().out
    assert "is_slippery" in shown
    assert "policies choose" in shown
    assert main.run(["task", "show", "recipe:hammer"]) == 0
    assert "shoal recipe show hammer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "gym:CartPole-v9"], "did you mean CartPole-v1"),
        (["show", "gym:CartPole-v1", "--env-set", "gravity=9"], "takes no argument 'gravity'; it takes max_episode"),
        (["show", "gym:CartPole-v1", "--env-set", "gravity"], "should be key=value, for example gravity=-9.8"),
        (["show", "gym:CartPole-v1", "--env-set", "render_mode=human"], "of its own; leave it out"),
        (["show", "recipe:hammer", "--env-set", "a=1"], "recipe tasks take no arguments"),
    ],
)
def test_wrong_use_is_one_clear_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["task", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


# --- arguments ---


def test_values_are_typed() -> None:
    given = env_arguments(["a=1", "b=-9.5", "c=false", "d=null", "e=8x8", 'f=["SF","FG"]', "g=a=b"])
    assert given == {"a": 1, "b": -9.5, "c": False, "d": None, "e": "8x8", "f": ["SF", "FG"], "g": "a=b"}
    check_arguments(given)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"a": "/etc/passwd"}, "looks like a path"),
        ({"a": ["../x"]}, "looks like a path"),
        ({"a": "~/x"}, "looks like a path"),
        ({"a": "c:\\x"}, "looks like a path"),
        ({"a": "x\0"}, "printable"),
        ({"a": "x" * 300}, "up to 256"),
        ({"a": {"b": 1}}, "cannot be"),
        ({"a": [[[[1]]]]}, "cannot be"),
        ({"a": 2**60}, "cannot be"),
        ({"a": float("nan")}, "cannot be"),
        ({"a": b"x"}, "cannot be"),
        ({"a b": 1}, "can be no argument"),
        ({"_a": 1}, "can be no argument"),
        ({f"a{i}": 1 for i in range(40)}, "at most 32"),
        ({"a": [1] * 4000}, "bytes long"),
    ],
)
def test_what_a_stranger_may_not_say_is_refused_with_the_manifest(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Manifest(owner=ANN.peer_id, task="gym:X-v0", algorithm="ppo", env_arguments=arguments)


def test_a_manifest_carries_them() -> None:
    plain = {"gravity": -9.5, "names": ["a", "b"], "is_windy": True}
    manifest = Manifest(owner=ANN.peer_id, task="gym:X-v0", algorithm="ppo", env_arguments=plain)
    swarm, data = sign_manifest(manifest, ANN)
    assert open_manifest(swarm, data).env_arguments == plain


def test_a_task_is_made_with_them() -> None:
    assert load_task("gym:FrozenLake-v1", {"map_name": "8x8"}).observation_space.size == 64
    short = load_task("gym:Pendulum-v1", {"max_episode_steps": 5, "g": 1.0})
    assert short.action_space == Continuous(1)
    env = short.make(1)
    env.reset([0])
    assert env._envs[0].unwrapped.g == 1.0  # type: ignore[attr-defined]
    cuts = [bool(env.step(short_act(short)).truncated[0]) for _ in range(5)]
    assert cuts == [False] * 4 + [True]


def short_act(task: Any) -> Any:
    import numpy as np

    return np.zeros((1, task.action_space.size), np.float32)


class Told(gymnasium.Env[Any, Any]):
    """Takes one argument that must be a number, and any other."""

    def __init__(self, level: float = 1.0, **others: Any) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 1, (1,))
        self.action_space = gymnasium.spaces.Discrete(2 + round(level))
        self.others = others


def test_one_that_takes_any_is_given_any_and_its_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = gymnasium.envs.registration.EnvSpec("Told-v0", entry_point=Told, kwargs={"level": 2.0})
    monkeypatch.setitem(gymnasium.registry, "Told-v0", entry)
    assert load_task("gym:Told-v0").action_space == Discrete(4)
    assert load_task("gym:Told-v0", {"level": 3, "more": 1}).action_space == Discrete(5)
    with pytest.raises(TaskFailedError, match="gym:Told-v0 cannot be made") as caught:
        load_task("gym:Told-v0", {"level": "high"})
    assert "\n" not in str(caught.value)


def test_of_atari_games_a_run_says_the_game_and_not_the_frames() -> None:
    pytest.importorskip("ale_py", reason="the atari extra brings it")
    pytest.importorskip("cv2", reason="the atari extra brings it")
    assert load_task("gym:ALE/Pong-v5", {"full_action_space": True}).action_space == Discrete(18)
    for name in ("frameskip", "obs_type", "game"):
        with pytest.raises(UsageError, match=r"leave it out|takes no argument"):
            load_task("gym:ALE/Pong-v5", {name: "ram"})


# --- environments of other packages ---


def a_package(folder: Path, module: str, needs: str, code: str) -> None:
    """As pip would have installed it."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(code, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n{needs}\n", encoding="utf-8")
    (info / "top_level.txt").write_text(f"{module}\n", encoding="utf-8")


REGISTERS = """
import gymnasium
class Shows(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        place=gymnasium.spaces.Box(0, 1, (2, 3, 3)), way=gymnasium.spaces.Discrete(3), said=gymnasium.spaces.Text(5)
    )
    action_space = gymnasium.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}
    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}
gymnasium.register("Foreign-v0", Shows)
"""


def test_a_package_that_knows_nothing_of_shoal_is_named_before_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Gymnasium writes it; of what it shows, what can be learned from is seen."""
    a_package(tmp_path, "foreign_envs", "Requires-Dist: gymnasium>=1.0", REGISTERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "gym:foreign_envs:Foreign-v0"
    with pytest.raises(UsageError, match=r"shows Text, which is not .* leave it out \(--env-set observe=KEY"):
        load_task(name)
    assert main.run(["task", "ls", "--package", "foreign_envs", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [name]
    assert main.run(["task", "ls", "--package", "os"]) == 2
    for keys, size in (("place", (2, 3, 3)), (["place", "way"], (21,)), (["way"], (3,))):
        task = load_task(name, {"observe": keys})
        assert task.observation_space.shape == size
        task.try_out(0)  # type: ignore[attr-defined]
        assert task.name == name
    with pytest.raises(UsageError, match="Foreign-v0 shows the keys place, way, said"):
        load_task(name, {"observe": "plaice"})
    with pytest.raises(UsageError, match="CartPole-v1 shows no Dict"):
        load_task("gym:CartPole-v1", {"observe": "place"})
    with pytest.raises(UsageError, match="no Gymnasium environment is called 'Foreign-v1'; did you mean Foreign-v0"):
        load_task("gym:foreign_envs:Foreign-v1")


@pytest.mark.parametrize("needs", ["", "Requires-Dist: gymnasium ; extra == 'rl'", "Requires-Dist: gymnasium-extras"])
def test_no_other_code_is_imported_for_a_name_that_a_stranger_wrote(
    needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_package(tmp_path, "other_code", needs, "raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("other_code", "os", "other_code.inner", "no_such", "..", ""):
        with pytest.raises(UsageError, match="is no installed package that needs Gymnasium"):
            load_task(f"gym:{module}:Name-v0")


def test_one_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class NoDisplayError(Exception): pass\nraise NoDisplayError('no\\ndisplay')"
    a_package(tmp_path, "needs_display", "Requires-Dist: gymnasium", code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="needs_display cannot be imported here: NoDisplayError: no display"):
        load_task("gym:needs_display:Name-v0")


def test_an_error_without_words_tells_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> None:
        raise AssertionError

    entry = gymnasium.envs.registration.EnvSpec("Silent-v0", entry_point=made)
    monkeypatch.setitem(gymnasium.registry, "Silent-v0", entry)
    with pytest.raises(TaskFailedError, match=r"AssertionError in line \d+ of test_task_catalogue\.py$"):
        load_task("gym:Silent-v0")
