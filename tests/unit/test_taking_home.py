"""A trained policy is looked at and taken elsewhere: it plays, is recorded, and acts the same in another runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from shoal.cli import main
from shoal.protocol.codec import to_plain
from shoal.protocol.signing import Signer
from shoal.training.algorithms import load_algorithm
from shoal.training.manifest import Manifest
from shoal.training.requirements import requirements
from shoal.training.showing import Recording
from shoal.training.state import encode_arrays
from shoal.training.tasks import load_task
from shoal.training.tasks.failures import TaskFailedError
from shoal.training.trained import Trained, read_trained

ANN = Signer(b"a" * 32)


class Images(gymnasium.Env[Any, Any]):
    """Shows noise of some shape for five steps."""

    def __init__(self, rows: int = 40, channels_last: bool = False) -> None:
        shape = (rows, rows, 3) if channels_last else (3, rows, rows)
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.MultiDiscrete([2, 3], start=[1, 0])
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._noise(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self._noise(), 1.0, self.steps == 5, False, {}

    def _noise(self) -> Any:
        return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)


class Several(Images):
    """Shows the same, and takes several actions at once."""

    def __init__(self, are_numbers: bool) -> None:
        super().__init__(rows=6)
        box, spaces = gymnasium.spaces.Box(0, 4, (2, 1), np.float64), gymnasium.spaces
        leaves = (box, box) if are_numbers else (spaces.Discrete(3, start=4), spaces.MultiBinary(2))
        self.action_space = spaces.Dict(arm=leaves[0], others=spaces.Tuple([leaves[1]]))


@pytest.fixture(autouse=True)
def _with_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("Images-v0", Images), ("Several-v0", Several)):
        monkeypatch.setitem(gymnasium.registry, name, gymnasium.envs.registration.EnvSpec(name, entry_point=kind))


def a_policy(path: Path, task_name: str, algorithm: str = "ppo", *, env: Any = None, **settings: Any) -> Path:
    """What a run leaves, with parameters of a learner that has learned nothing; its normaliser has seen something."""
    task, kind = load_task(task_name, env), load_algorithm(algorithm)
    needs = requirements(algorithm, kind.version, task_name, task.version)
    manifest = Manifest(
        owner=ANN.peer_id,
        task=task_name,
        algorithm=algorithm,
        hyperparameters=settings,
        env_arguments=env or {},
        requires=needs,
    )
    arrays = kind.learner(manifest, task, peer=ANN.peer_id).policy_arrays()
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        if name.startswith("parameters/"):
            array += rng.normal(0, 0.3, array.shape).astype(np.float32)
    if "moments/observation/count" in arrays:
        arrays["moments/observation/count"] = np.asarray(100, arrays["moments/observation/count"].dtype)
        arrays["moments/observation/mean"] += 0.1
        arrays["moments/observation/m2"] += 50
    path.write_bytes(encode_arrays(arrays, {"manifest": to_plain(manifest)}))
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


CASES = [
    ("gym:CartPole-v1", "ppo", {"normalize_observations": True}, {}),
    ("gym:CartPole-v1", "dqn", {}, {}),
    ("gym:Pendulum-v1", "ppo", {"normalize_observations": True}, {"max_episode_steps": 30}),
    ("gym:Pendulum-v1", "sac", {}, {"max_episode_steps": 30}),
    ("gym:FrozenLake-v1", "a2c", {}, {"is_slippery": False}),
    ("gym:Images-v0", "ppo", {"network": "nature"}, {}),
    ("gym:Images-v0", "ppo", {"network": "impala"}, {"rows": 20, "channels_last": True}),
    ("gym:Images-v0", "ppo", {"network": "mlp"}, {"rows": 6}),
]


@pytest.mark.parametrize(("task", "algorithm", "settings", "env"), CASES)
def test_an_exported_policy_acts_the_same_in_another_runtime(
    task: str, algorithm: str, settings: dict[str, Any], env: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime runs what was exported")
    pytest.importorskip("onnx", reason="the export extra brings it")
    path = a_policy(tmp_path / "policy.safetensors", task, algorithm, env=env, **settings)
    out = tmp_path / "policy.onnx"
    assert said(capsys, "export", str(path), "--to", str(out))["out"] == str(out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    trained = read_trained(path)
    alone = made(task, env)
    seen, acted, there = episodes(trained)
    assert len(seen) >= 5
    for shown, action, theirs in zip(seen, acted, there, strict=True):
        (found,) = session.run(None, {"observation": shown})
        if isinstance(alone.action_space, gymnasium.spaces.Box):
            np.testing.assert_allclose(found[0], theirs, atol=1e-5)
            assert found.dtype == alone.action_space.dtype
        else:
            assert np.array_equal(found[0], theirs), (found, action)
        assert alone.action_space.contains(found[0])
    # and the file alone is enough to act by, as docs/tasks.md shows it
    batch = np.concatenate(seen[:3])
    assert len(session.run(None, {"observation": batch})[0]) == 3


@pytest.mark.parametrize("are_numbers", [True, False])
def test_of_several_actions_at_once_each_is_an_output(are_numbers: bool, tmp_path: Path, capsys: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime runs what was exported")
    pytest.importorskip("onnx", reason="the export extra brings it")
    env = {"are_numbers": are_numbers}
    path, out = a_policy(tmp_path / "x.safetensors", "gym:Several-v0", env=env, network="mlp"), tmp_path / "x.onnx"
    said(capsys, "export", str(path), "--to", str(out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    assert names == ["action/arm", "action/others/0"]
    seen, _, there = episodes(read_trained(path))
    for shown, theirs in zip(seen, there, strict=True):
        arm, other = session.run(names, {"observation": shown})
        np.testing.assert_allclose(arm[0], theirs["arm"], atol=1e-5)
        np.testing.assert_allclose(other[0], theirs["others"][0], atol=1e-5)
        assert made("gym:Several-v0", env).action_space.contains({"arm": arm[0], "others": (other[0],)})


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_the_example_runs_what_was_exported(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime runs what was exported")
    pytest.importorskip("onnx", reason="the export extra brings it")
    out = tmp_path / "policy.onnx"
    path = a_policy(tmp_path / "policy.safetensors", "gym:CartPole-v1", memory=memory)
    said(capsys, "export", str(path), "--to", str(out))
    example = Path(__file__).resolve().parents[2] / "examples" / "exported.py"
    ran = subprocess.run([sys.executable, str(example), str(out)], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("episode 0  return ")


def made(task: str, env: dict[str, Any]) -> Any:
    return gymnasium.make(task.removeprefix("gym:"), disable_env_checker=True, **env)


def episodes(trained: Trained) -> tuple[list[Any], list[Any], list[Any]]:
    """What is shown in some steps, what the policy does, and what its environment is given for that."""
    env = trained.task.make(1)
    observations, act = env.reset([3]), trained.acting()
    seen, acted, there = [], [], []
    for _ in range(40):
        action = act(observations)
        seen.append(observations.copy())
        acted.append(action)
        there.append(trained.task.to_env(action)[0])  # type: ignore[attr-defined]
        observations = env.step(action).observations
    env.close()
    return seen, acted, there


def test_a_policy_plays_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pytest.importorskip("PIL.Image", reason="the play extra brings Pillow")
    pytest.importorskip("pygame", reason="the play extra brings pygame")
    path = a_policy(tmp_path / "policy.safetensors", "gym:CartPole-v1")
    out = tmp_path / "x.gif"
    told = said(capsys, "play", str(path), "--episodes", "2", "--out", str(out))
    assert told["out"] == str(out)
    assert len(told["returns"]) == 2
    assert all(0 < each <= 500 for each in told["returns"])
    with images.open(out) as film:
        assert film.n_frames >= 2
        film.seek(film.n_frames - 1)
        assert len(film.convert("RGB").getcolors(100_000)) > 2  # a cart, a pole and a track
    assert said(capsys, "play", str(path), "--episodes", "2")["returns"] == told["returns"]


def test_it_is_recorded_as_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many frames as steps, at the environment's speed of 50, halved, with something to see in each."""
    av = pytest.importorskip("av", reason="aiortc brings it")
    pytest.importorskip("pygame", reason="the play extra brings pygame")
    path, out = a_policy(tmp_path / "policy.safetensors", "gym:CartPole-v1"), tmp_path / "x.MP4"
    (earned,) = said(capsys, "play", str(path), "--out", str(out))["returns"]
    with av.open(str(out)) as film:
        (stream,) = film.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 25)
    assert len(frames) == (earned + 1) // 2
    assert {frame.shape for frame in frames} == {(400, 600, 3)}
    assert all(frame.min() < 60 and frame.max() > 200 for frame in frames)  # a black cart on white
    assert main.run(["play", str(path), "--out", str(tmp_path / "no" / "x.mp4")]) != 0
    assert "cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.gif", "x.mp4"])
def test_what_an_environment_draws_is_checked(name: str, tmp_path: Path) -> None:
    """It is other people's; an odd size is no fault of it."""
    film = Recording(tmp_path / name, 30.0)
    film.add(np.zeros((5, 7, 3), np.uint8))
    for wrong in (None, np.zeros((5, 7, 3)), np.zeros((5, 7), np.uint8), np.zeros((1, 7, 3), np.uint8)):
        with pytest.raises(TaskFailedError, match="and no colour image"):
            film.add(wrong)
    with pytest.raises(TaskFailedError, match="not of one size"):
        film.add(np.zeros((6, 7, 3), np.uint8))
    film.close()
    assert (tmp_path / name).stat().st_size > 50


@pytest.mark.parametrize("task", ["gym:CartPole-v1", "gym:Pendulum-v1"])
def test_one_that_remembers_is_given_its_memory_and_gives_the_next(task: str, tmp_path: Path, capsys: Any) -> None:
    """Over an episode, from zeros on, and of several episodes side by side."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime runs what was exported")
    pytest.importorskip("onnx", reason="the export extra brings it")
    settings = {"memory": "gru", "normalize_observations": True}
    path, out = a_policy(tmp_path / "policy.safetensors", task, **settings), tmp_path / "x.onnx"
    assert len(said(capsys, "play", str(path))["returns"]) == 1
    said(capsys, "export", str(path), "--to", str(out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (_, given) = session.get_inputs()
    assert (given.name, given.shape[0]) == ("memory", "N")
    trained = read_trained(path)
    env, act = trained.task.make(1), trained.acting()
    shown, memory = env.reset([3]), np.zeros((1, given.shape[1]), np.float32)
    actions = set()
    for _ in range(40):
        action = act(shown)
        found, memory = session.run(["action", "next_memory"], {"observation": shown, "memory": memory})
        np.testing.assert_allclose(found[0], trained.task.to_env(action)[0], atol=1e-4)  # type: ignore[attr-defined]
        actions.add(found.tobytes())
        shown = env.step(action).observations
    env.close()
    assert len(actions) > 1
    assert np.abs(memory).max() > 0.1
    two = {"observation": np.repeat(shown, 2, 0), "memory": np.repeat(memory, 2, 0)}
    assert len(session.run(["next_memory"], two)[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["play", "bagaqnosuch"], "neither a file nor a swarm of this profile"),
        (["play", "no/such/file"], "cannot be read"),
        (["export", "x", "--to", "x.pt"], "ends with .onnx"),
        (["play", "FILE", "--out", "x.avi"], "ends with .gif or .mp4"),
    ],
)
def test_wrong_use_is_one_clear_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    path = a_policy(tmp_path / "policy.safetensors", "gym:CartPole-v1")
    assert main.run([str(path) if each == "FILE" else each for each in arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_run_is_found_by_the_beginning_of_its_name(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    folder = tmp_path / "profiles" / "default" / "swarms" / "bagaqiera123"
    folder.mkdir(parents=True)
    assert main.run(["play", "bagaq"]) == 2
    assert "has left no policy yet" in capsys.readouterr().err
    a_policy(folder / "policy.safetensors", "gym:CartPole-v1")
    assert said(capsys, "play", "bagaq")["out"] is None


def test_a_file_that_is_no_policy_of_such_a_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "policy.safetensors"
    for data, words in (
        (b"nonsense", "are not a Shoal state"),
        (encode_arrays({}, {}), "does not say how it was trained"),
    ):
        path.write_bytes(data)
        assert main.run(["play", str(path)]) != 0
        assert words in capsys.readouterr().err
