"""Whose a policy is, among real nodes: of all, of all in part, of each node its own, of nobody; with a node killed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from shoal.training.recipes.makers import make_model
from shoal.training.state import decode_arrays
from shoal.training.tasks.source import seed_of

END_AT = 64 * 3 * 4 * 40  # turns: four roles are asked in every play


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The recipe, as a package that is installed on every node."""
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(Path(__file__).with_name("populations.py"), site)
    about = site / "populations-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: populations\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[shoal.recipes]\npopulation = populations:RECIPE\n")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(str(site))


def read(path):
    return decode_arrays(Path(path).read_bytes())[0]


def of(arrays, policy, network):
    prefix = f"{policy}/parameters/{network}"
    return {name: array for name, array in arrays.items() if name.startswith(prefix)}


def are_equal(arrays, others):
    return arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)


@pytest.mark.usefixtures("installed")
def test_each_policy_is_whose_it_is_said_to_be_and_learns_though_a_node_is_killed(make_node):
    nodes = [make_node() for _ in range(3)]
    sizes = ("--batch-per-learner", "256", "--min-learners", "3", "--max-env-steps", str(END_AT))
    created = nodes[0].ask("swarm", "create", "--task", "recipe:population", *sizes)
    for node in nodes[1:]:
        node.ask("join", created["ticket"], "-d")
    swarm = created["swarm"]
    nodes[0].wait_for(swarm, "they learn", lambda shown: shown["epoch"] >= 5)
    nodes[2].kill()
    gone_at = nodes[0].wait_for(swarm, "how far they are", lambda shown: shown["epoch"] > 0)["epoch"]
    nodes[0].wait_for(swarm, "they go on", lambda shown: shown["epoch"] >= gone_at + 3)
    nodes[2].up()
    ended = [node.wait_for(swarm, "it ends", lambda shown: shown["phase"] == "done") for node in nodes]
    shared = [read(Path(shown["results"]) / "policy.safetensors") for shown in ended]
    (own,) = ([read(path) for node in nodes for path in node.home.rglob(f"**/{node.profile}/**/private.safetensors")],)

    assert len(own) == 3
    for one in shared[1:]:
        assert are_equal(one, shared[0])
    assert of(shared[0], "common", "decide")
    assert of(shared[0], "common", "value")
    assert of(shared[0], "partly", "decide")
    assert not of(shared[0], "partly", "value")
    assert not of(shared[0], "own", "")
    assert all(of(each, "partly", "value") and of(each, "own", "decide") for each in own)
    for policy, network in (("partly", "value"), ("own", "decide")):
        assert not any(are_equal(of(own[0], policy, network), of(other, policy, network)) for other in own[1:])

    from populations import RECIPE

    first = make_model(
        "mlp", {"hidden_sizes": (16,)}, seed_of(0, "model", "frozen"), lambda: [RECIPE.game.roles["own"]]
    )
    initial = {f"frozen/parameters/{name}": array for name, array in first.parameters.items()}
    assert are_equal(of(shared[0], "frozen", ""), initial)

    scores = max(ended[0]["scores"], key=lambda each: each["epoch"])["scores"]
    assert min(scores[kind] for kind in ("common", "partly", "own")) > 0.9 > scores["frozen"], scores
