"""What the node counts, as Prometheus reads it: the text exposition format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/. Names end in ``_total`` where they only grow. Labels are
of few values: methods that are served here, the swarms that this node is in, the parts of their recipes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from shoal.node.api.schemas import MethodInfo, MetricsInfo, NodeInfo, SwarmDetail

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[Mapping[str, str], float]


def exposition(node: NodeInfo, metrics: MetricsInfo, swarms: list[SwarmDetail]) -> str:
    """All families, one after the other."""
    return "".join(_families(node, metrics, swarms))


def _families(node: NodeInfo, metrics: MetricsInfo, swarms: list[SwarmDetail]) -> Iterator[str]:
    yield _family("shoal_uptime_seconds", "gauge", "Since the node started.", [({}, node.uptime_s)])
    yield _family("shoal_peers", "gauge", "Nodes that it is connected to.", [({}, node.num_peers)])
    sides = [("served", metrics.served), ("called", metrics.called)]
    yield _family("shoal_calls_total", "counter", "Calls that are over.", _methods(sides, "calls"))
    yield _family("shoal_request_bytes_total", "counter", "Of requests.", _methods(sides, "request_bytes"))
    yield _family("shoal_answer_bytes_total", "counter", "Of answers.", _methods(sides, "answer_bytes"))
    failed = [
        ({"side": side, "method": name, "status": status}, count)
        for side, methods in sides
        for name, method in methods.items()
        for status, count in method.errors.items()
    ]
    yield _family("shoal_call_errors_total", "counter", "Calls that failed.", failed)
    tasks = [({"domain": each.domain, "task": each.task, "fault": each.fault}, each.count) for each in metrics.failures]
    yield _family("shoal_task_failures_total", "counter", "Tasks that failed, by whose fault.", tasks)
    for name, kind, words, field in _OF_SWARMS:
        yield _family(name, kind, words, [({"swarm": each.swarm}, float(getattr(each, field))) for each in swarms])
    for field, words in _OF_CONSULTS.items():
        samples = [
            ({"swarm": each.swarm, "part": part}, float(getattr(tally, field)))
            for each in swarms
            for part, tally in each.consults.items()
        ]
        yield _family(f"shoal_consults_{field}_total", "counter", words, samples)


_OF_SWARMS: Final = (
    ("shoal_swarm_epoch", "gauge", "Of the policy that this node holds.", "epoch"),
    ("shoal_swarm_env_steps", "gauge", "Environment steps of all members together.", "env_steps"),
    ("shoal_swarm_steps_per_second", "gauge", "Of all live members together.", "steps_per_s"),
    ("shoal_swarm_members", "gauge", "Members that are there.", "num_members"),
    ("shoal_swarm_alone", "gauge", "1 while nobody else is there.", "alone"),
    ("shoal_swarm_asks", "gauge", "Asks that wait for the person at this node.", "num_asks"),
)
_OF_CONSULTS: Final = {
    "asked": "Acts that plays here asked other members or people for, by the part that was asked.",
    "answered": "Of them, those that came.",
    "unanswered": "Of them, those that did not.",
    "fell_back": "Of the unanswered, those where the seat's stand-in played on.",
    "seconds": "That plays here waited for them.",
}


def _methods(sides: list[tuple[str, dict[str, MethodInfo]]], field: str) -> list[_Sample]:
    return [
        ({"side": side, "method": name}, getattr(method, field))
        for side, methods in sides
        for name, method in methods.items()
    ]


def _family(name: str, kind: str, words: str, samples: Sequence[_Sample]) -> str:
    """One family; nothing, where it has no samples."""
    if not samples:
        return ""
    lines = [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(str(text))}"' for label, text in labels.items())
        lines.append(f"{name}{{{inner}}} {value:.17g}" if inner else f"{name} {value:.17g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
