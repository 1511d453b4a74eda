"""Whatever is asked of a real node's API is answered: with what was asked for, or with an error in the one form.

Schemathesis makes up requests from the node's own OpenAPI description; beside them stand those that it does not think
of, and that met a 500 once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy

from .conftest import Node, nodes_in

STOPS = "/v1/node/stop"
ENDLESS = "/v1/events"
BUSY = 503
"""Nobody could be reached: the one failure of a request that is neither its own fault nor this program's."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with nodes_in(tmp_path_factory.mktemp("asked")) as make_node:
        yield make_node("--no-port-mapping")


@pytest.fixture
def api(node: Node) -> Iterator[httpx.Client]:
    bearer = {"Authorization": f"Bearer {node.config.paths.api_token.read_text()}"}
    with httpx.Client(base_url=node.info["api"], headers=bearer, trust_env=False, timeout=30) as client:
        yield client
        assert "Traceback" not in node.log()


def is_answered(answer: httpx.Response) -> bool:
    """Success, or an error of the form that docs/api.md states."""
    if answer.status_code < 300:
        return True
    error = answer.json()["error"]
    return answer.status_code < 500 or (answer.status_code == BUSY and error["code"] == 4)


def test_made_up_requests_are_answered(api: httpx.Client) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install 'shoal[dev]' brings it")
    schema = schemathesis.openapi.from_dict(api.get("/openapi.json").json())
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {"/v1/swarms", "/v1/swarms/join", "/v1/ping", "/v1/bench"} <= {each.path for each in operations}
    for operation in operations:
        if operation.path in (STOPS, ENDLESS):
            continue
        if not operation.body and not operation.path_parameters:
            assert is_answered(api.request(operation.method, operation.path))
            continue
        for mode in schemathesis.GenerationMode:
            with contextlib.suppress(Unsatisfiable):  # there are no wrong paths of text
                ask(api, operation.as_strategy(generation_mode=mode), 25 if operation.body else 5)


def ask(api: httpx.Client, cases: SearchStrategy[Any], number: int) -> None:
    @settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask_one(case: Any) -> None:
        told = case.as_transport_kwargs(base_url=str(api.base_url))
        words = {"params": told.get("params"), "json": told.get("json"), "content": told.get("data")}
        answer = api.request(told["method"], told["url"], **words)
        assert is_answered(answer), (case, answer.text)

    ask_one()


GIVEN = {"task": "gym:CartPole-v1", "algorithm": "ppo"}
ODD: dict[str, Any] = {
    "a seed of 65 bits": {"seed": 2**64},
    "steps of 71 bits": {"max_env_steps": 2**70},
    "a setting of 81 bits": {"hyperparameters": {"num_envs": 2**80}},
    "an endless setting": {"hyperparameters": {"learning_rate": float("inf")}},
    "a target that is no number": {"target_return": float("nan")},
    "half a character in the task": {"task": "gym:\ud800"},
    "half a character in the algorithm": {"algorithm": "\udfff"},
    "half a character in the name": {"name": "\ud800"},
    "half a character in a setting's name": {"hyperparameters": {"\ud800": 1}},
    "a text that no command line holds": {"task": "gym:" + "x" * 200_000},
    "brackets without end": {"hyperparameters": {"a": json.loads("[" * 100 + "]" * 100)}},
    "a list without end": {"hyperparameters": {"a": [0] * 20_000}},
}


def test_what_the_node_cannot_write_down_is_not_understood(api: httpx.Client) -> None:
    joined = api.get("/v1/swarms").json()

    def post(content: str | bytes) -> httpx.Response:
        return api.post("/v1/swarms", content=content, headers={"Content-Type": "application/json"})

    for what, body in ODD.items():
        answer = post(json.dumps(GIVEN | body))
        assert answer.status_code == 422, (what, answer.text)
        assert answer.json()["error"]["code"] == 2, what
    for content in (b"{", b"\xff", b"[" * 100_000, b"null", b"[]", b"7"):
        assert post(content).status_code == 422, content[:10]
    for field in ("peer", "ticket"):
        route = {"peer": "/v1/ping", "ticket": "/v1/swarms/join"}[field]
        answer = api.post(route, content=json.dumps({field: "\ud800"}), headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, (route, answer.text)
    for path in ("/v1/swarms/%ff", "/v1/swarms/%ed%a0%80", "/v1/state/%00", f"/v1/swarms/{'x' * 5000}"):
        assert api.get(path).status_code == 404, path
    assert api.get("/v1/swarms").json() == joined
