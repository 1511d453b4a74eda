"""What the tree promises about itself: who imports whom, what cores leave alone, what an install puts where.

Every promise has a guard, a function from sources to violations, and a second test in which the guard meets a planted
violation: a guard that finds nothing because it looks at nothing fails there.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).resolve().parents[2]

# Each room, and the rooms that it may import beside itself.
MAY_IMPORT = {
    "cli": {"node", "training", "dht", "crdt", "protocol"},
    "node": {"training", "dht", "crdt", "protocol"},
    "training": {"dht", "crdt", "protocol"},
    "dht": {"protocol"},
    "crdt": {"protocol"},
    "protocol": set(),
}
ROOMS = tuple(MAY_IMPORT)

# The rooms inside node/ and the files beside them, lowest first: each may import those before it. Whatever of node/ is
# not named here is the process itself, above all of them.
NODE_LAYERS = (
    (
        "shoal.node.late",
        "shoal.node.signals",
        "shoal.node.metrics",
        "shoal.node.budgets",
        "shoal.node.traffic",
        "shoal.node.supervise",
    ),
    ("shoal.node.store",),
    ("shoal.node.wire",),
    ("shoal.node.mesh",),
    ("shoal.node.reach",),
    ("shoal.node.profile", "shoal.node.config", "shoal.node.identity", "shoal.node.lock", "shoal.node.logs"),
    ("shoal.node.api",),
    ("shoal.node.swarm",),
)
# What decides in node/ is as pure as the cores in the other rooms.
NODE_CORES = (
    *("shoal.node.mesh.address_book", "shoal.node.mesh.connections", "shoal.node.mesh.paths"),
    *("shoal.node.mesh.endpoint", "shoal.node.mesh.intake", "shoal.node.mesh.relay_limits", "shoal.node.reach.nat"),
)

TORCH_FOLDERS = ("shoal.training.tasks", "shoal.training.algorithms", "shoal.training.models")
WORKER_SHELLS = (
    *("shoal.training.rollouts.bench", "shoal.training.worker", "shoal.training.keeper", "shoal.training.watch"),
    *("shoal.training.tasks.foreign", "shoal.training.tasks.seat_host"),
    *("shoal.training.tasks.failures", "shoal.training.tasks.__main__"),
    *("shoal.training.loop.averager", "shoal.training.loop.gate", "shoal.training.loop.node"),
)

LOOPS_AND_WIRES = (
    *("trio", "asyncio", "anyio", "uvloop", "curio", "concurrent", "threading", "_thread", "multiprocessing"),
    *(
        "socket",
        "socketserver",
        "select",
        "selectors",
        "ssl",
        "http",
        "urllib.request",
        "httpx",
        "hypercorn",
        "fastapi",
    ),
    *("subprocess", "signal"),
)
CLOCKS_AND_CHANCE = ("time", "datetime", "sched", "random", "numpy.random", "secrets", "uuid", "os.urandom")
# A generator that is handed in, or seeded by what is handed in, is an argument like any other.
SEEDED = (
    *("random.Random", "numpy.random.Generator", "numpy.random.default_rng", "numpy.random.SeedSequence"),
    "numpy.random.PCG64",
)

CODE_LOADERS = (
    *("pickle", "_pickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("torch.load", "torch.save", "torch.serialization", "torch.hub", "torch.package", "torch.jit.load"),
)


# --- reading sources -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Module:
    """One source file under the name by which it is imported."""

    name: str
    tree: ast.Module
    is_package: bool = False

    @property
    def room(self) -> str:
        """The room that the module belongs to; empty for ``shoal`` itself."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def package(self) -> list[str]:
        """Where a relative import of one dot starts."""
        parts = self.name.split(".")
        return parts if self.is_package else parts[:-1]


def planted(name: str, source: str) -> Module:
    return Module(name, ast.parse(textwrap.dedent(source)))


def read(path: Path, root: Path, prefix: str = "") -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join([*([prefix] if prefix else []), *(parts[:-1] if is_package else parts)])
    return Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)), is_package)


@functools.cache
def product_modules() -> list[Module]:
    """Everything that is imported as ``shoal`` or ``shoal.…``."""
    modules = [read(path, ROOT, "shoal") for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [read(ROOT / "src/shoal/__init__.py", ROOT / "src"), *modules]


@functools.cache
def all_modules() -> list[Module]:
    """The product, and everything around it."""
    around = ("tests", "benchmarks", "examples", "tools", "docs", ".ci")
    paths = [path for folder in around for path in sorted((ROOT / folder).rglob("*.py"))]
    return product_modules() + [read(path, ROOT) for path in paths]


def imports(module: Module) -> Iterator[tuple[str, str, int]]:
    """All that a module imports, wherever in it: (the name it gets there, the full name of what it is, the line)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if alias.asname is None and top != alias.name:
                    yield top, top, node.lineno
                yield alias.asname or alias.name, alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = module.package[: len(module.package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = source if alias.name == "*" else f"{source}.{alias.name}"
                yield alias.asname or alias.name, full, node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield "", node.args[0].value, node.lineno


def references(module: Module) -> Iterator[tuple[str, int]]:
    """The full name of all that a module imports, and of every attribute that it takes from an import."""
    meaning: dict[str, str] = {}
    for name, full, line in imports(module):
        meaning[name] = full
        yield full, line
    chains = [node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in chains}
    for node in chains:
        if id(node) not in inner:  # of a.b.c only the whole, else np.random.Generator would count as np.random
            first, *rest = ast.unparse(node).split(".")
            if first in meaning:
                yield ".".join([meaning[first], *rest]), node.lineno


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def mentions(modules: Iterable[Module], packages: Iterable[str], allowed: Iterable[str] = ()) -> list[str]:
    """Where modules import or use one of some packages."""
    packages, allowed = tuple(packages), tuple(allowed)
    found = (
        f"{module.name}:{line} uses {name}"
        for module in modules
        for name, line in references(module)
        if within(name, packages) and not within(name, allowed)
    )
    return sorted(set(found))


# --- imports point down only -----------------------------------------------------------------------------------------


def upward_imports(modules: Iterable[Module]) -> list[str]:
    found = []
    for module in modules:
        may = MAY_IMPORT[module.room] | {module.room} if module.room else set()
        banned = [f"shoal.{room}" for room in ROOMS if room not in may]
        found += mentions([module], banned)
    return found


def test_imports_point_down_only() -> None:
    assert upward_imports(product_modules()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("shoal.protocol.planted", "import shoal.crdt"),
        ("shoal.dht.planted", "from shoal.crdt.oplog import Op"),
        ("shoal.crdt.planted", "from shoal import dht"),
        ("shoal.crdt.planted", "from ..dht import blocks"),
        ("shoal.training.tasks.planted", "from ...node.daemon import Daemon"),
        ("shoal.training.planted", "import shoal.node.wire.channel as rpc"),
        ("shoal.node.planted", "def late():\n    from shoal.cli import main"),
        ("shoal.node.planted", "import importlib\nimportlib.import_module('shoal.cli.main')"),
        ("shoal.protocol.planted", "import shoal\nshoal.training.manifest"),
        ("shoal", "from shoal.protocol import ids"),
    ],
)
def test_an_upward_import_is_caught(name: str, source: str) -> None:
    assert upward_imports([planted(name, source)])


def test_a_downward_import_is_let_through() -> None:
    modules = [
        planted("shoal.cli.planted", "from shoal.node.api.client import Client"),
        planted("shoal.training.exchange.planted", "from ...crdt import views\nfrom . import rounds"),
        planted("shoal.dht.planted", "from shoal.protocol.ids import Cid"),
    ]
    assert upward_imports(modules) == []


# --- no circle of imports ------------------------------------------------------------------------------------------


def for_types_only(module: Module) -> set[int]:
    """The lines under ``if TYPE_CHECKING``: nothing is imported by them when the module runs."""
    found: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            found.update(range(node.lineno, node.body[-1].end_lineno + 1))
    return found


def import_graph(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Which of some modules each imports, wherever in it: a late import only hides a circle."""
    by_name = {module.name: module for module in modules}
    graph: dict[str, set[str]] = {}
    for name, module in by_name.items():
        ignored = for_types_only(module)
        graph[name] = set()
        for _, full, line in imports(module):
            found = full
            while found and found not in by_name:  # it may be something inside a module
                found = found.rpartition(".")[0]
            if found not in ("", "shoal", name) and line not in ignored:
                graph[name].add(found)
    return graph


def circles(modules: Iterable[Module]) -> list[list[str]]:
    """Groups of modules that each lead to all others of the group."""
    graph = import_graph(modules)

    def reached_from(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [*graph[start]]
        while ahead:
            name = ahead.pop()
            if name not in found:
                found.add(name)
                ahead += graph[name]
        return found

    reached = {name: reached_from(name) for name in graph}
    groups = {tuple(sorted(each for each in reached[name] if name in reached[each])) for name in graph}
    return sorted(list(group) for group in groups if group)


def layer_in_node(name: str) -> int:
    return next((number for number, layer in enumerate(NODE_LAYERS) if within(name, layer)), len(NODE_LAYERS))


def imports_up_in_node(modules: Iterable[Module]) -> list[str]:
    graph = import_graph(modules)
    return sorted(
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if within(name, ["shoal.node"]) and within(other, ["shoal.node"])
        if layer_in_node(other) > layer_in_node(name)
    )


def test_no_imports_go_round_in_circles() -> None:
    assert circles(product_modules()) == []


def test_the_rooms_of_the_node_have_an_order() -> None:
    modules = product_modules()
    assert imports_up_in_node(modules) == []
    named = [package for layer in NODE_LAYERS for package in layer if package != "shoal.node.supervise"]
    assert all(any(within(module.name, [package]) for module in modules) for package in named)


@pytest.mark.parametrize(
    "second",
    [
        "from shoal.node.mesh.one import One",
        "from . import one",
        "import shoal.node.mesh.one",
        "def late():\n    from shoal.node.mesh import one",
        "from shoal.node.mesh.three import Three",
    ],
)
def test_a_circle_is_caught(second: str) -> None:
    modules = [
        planted("shoal.node.mesh.one", "from shoal.node.mesh.two import Two"),
        planted("shoal.node.mesh.two", second),
        planted("shoal.node.mesh.three", "import shoal.node.mesh.one as one"),
    ]
    assert len(circles(modules)) == 1


def test_what_only_the_type_checker_imports_closes_no_circle() -> None:
    modules = [
        planted("shoal.dht.one", "from shoal.dht.two import Two"),
        planted("shoal.dht.two", "if TYPE_CHECKING:\n    from shoal.dht.one import One\nfrom shoal.dht import three"),
        planted("shoal.dht.three", ""),
    ]
    assert circles(modules) == []
    assert import_graph(modules)["shoal.dht.two"] == {"shoal.dht.three"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("shoal.node.mesh.planted", "from shoal.node.reach.upper import thing"),
        ("shoal.node.wire.planted", "from ..mesh.lower import thing"),
        ("shoal.node.signals", "def late():\n    from shoal.node.mesh import lower"),
        ("shoal.node.reach.planted", "from shoal.node.daemon import Daemon"),
    ],
)
def test_a_room_of_the_node_that_looks_up_is_caught(name: str, source: str) -> None:
    others = [planted(f"shoal.node.{name}", "") for name in ("mesh.lower", "reach.upper", "daemon")]
    assert imports_up_in_node([planted(name, source), *others])
    assert not imports_up_in_node([planted("shoal.node.reach.planted", "import shoal.node.mesh.lower"), *others])


# --- nobody outside the mesh writes into the host ---------------------------------------------------------------------


def writes_into_host(modules: Iterable[Module]) -> list[str]:
    """Where, outside the mesh, an attribute of a node's host is set, or an entry of one."""
    found = []
    for module in modules:
        if within(module.name, ["shoal.node.mesh"]) or not within(module.name, ["shoal.node", "shoal.cli"]):
            continue
        for node in ast.walk(module.tree):
            is_written = isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load)
            if is_written and re.search(r"\b_?host\.\w", ast.unparse(node)):
                found.append(f"{module.name}:{node.lineno} writes {ast.unparse(node)}")
    return found


def test_the_host_is_changed_by_its_methods_alone() -> None:
    assert writes_into_host(product_modules()) == []


@pytest.mark.parametrize(
    "source", ["self._host.announced = ()", "host.relays[peer] = address", "del node.host.wanted[peer]", "host.n += 1"]
)
def test_a_write_into_the_host_is_caught(source: str) -> None:
    assert writes_into_host([planted("shoal.node.reach.planted", source)])


# --- every task of the node stands in a failure domain ---------------------------------------------------------------

# Nurseries of a single call: it ends with them, and its caller gets what fails in them.
NURSERIES = {
    "shoal.node.mesh.provider_store.find_providers": "one look-up asks several at once, and is over with them",
    "shoal.node.supervise.start_soon": "the nursery under all failure domains",
    "shoal.node.api.app.__call__": "one answer to a client of the local API",
    "shoal.node.api.server._serve": "the local API, which is a task as a whole",
    "shoal.node.mesh.dialing._dial_all": "one attempt to reach a peer",
    "shoal.node.mesh.libp2p_host._cut": "the end of a few connections",
    "shoal.node.mesh.libp2p_host.close": "the goodbyes when the node ends",
    "shoal.node.mesh.libp2p_repairs.write_frame": "one write",
    "shoal.node.mesh.relay.run": "both ways of one circuit, which is served in libp2p's task",
    "shoal.node.reach.climb._climb": "one climb, which is a task",
    "shoal.node.reach.climb._try_direct": "one climb, which is a task",
    "shoal.node.reach.portmap._map_port": "one question to the router",
    "shoal.node.reach.probing.round": "one round of questions to peers",
    "shoal.node.reach.punch._dial_all": "one punch",
    "shoal.node.reach.reach._check_paths": "one check of all paths, which is a task",
    "shoal.node.reach.reach._keep_telling": "one round of introductions",
    "shoal.node.swarm.content._carry_out": "one fetch",
    "shoal.node.swarm.content._fly": "one fetch",
    "shoal.node.swarm.loops.next_loop": "one loop of the user, and the run goes on with the next",
    "shoal.node.swarm.loops.open_door": "where loops attach to a run, which is a task as a whole",
    "shoal.node.swarm.lookup.look_up": "one question of a person",
    "shoal.node.swarm.names._publish": "one version that somebody publishes",
    "shoal.node.swarm.names.look_up": "one look-up: whoever fails in it knows nothing",
    "shoal.node.swarm.posting.latest": "one question: what fails in a part of it is left out of the answer",
    "shoal.node.swarm.reduce_bench._raw": "one measurement that somebody asked for",
    "shoal.node.swarm.reducing._do": "one all-reduce: what fails in a part of it fails it",
    "shoal.node.swarm.reducing._ask": "one question of an all-reduce to its members",
    "shoal.node.swarm.reducing.run": "one all-reduce, as above",
    "shoal.node.swarm.reducing._go_on": "one all-reduce, as above",
    "shoal.node.swarm.reducing._tell_ended": "one all-reduce, as above",
    "shoal.node.swarm.reducing._audit_soon": "one all-reduce, as above",
    "shoal.node.swarm.reducing._audit": "one all-reduce, as above",
    "shoal.node.swarm.exchanging.reduced": "one all-reduce, as above: its members are connected to",
    "shoal.node.swarm.following.follow": "what came of one all-reduce: its parts are asked for",
    "shoal.node.swarm.holders.look": "one look-up: whoever fails in it has nothing",
    "shoal.node.swarm.introducing.fetch_manifest": "one attempt to join, of which whoever joins is told",
    "shoal.node.swarm.runner._run_in_role": "a run, a task as a whole: what fails in one part leaves no other",
    "shoal.node.swarm.swarms._connect": "one attempt to reach a member",
    "shoal.node.swarm.telling._push_loop": "what one peer is told, which is a task as a whole",
    "shoal.node.swarm.trees._carry_out": "one fetch, of which whoever asked for it is told",
    "shoal.node.swarm.trees._fetch_index": "one fetch, of which whoever asked for it is told",
    "shoal.node.swarm.trees._fly": "one fetch, of which whoever asked for it is told",
    "shoal.node.swarm.workers.open_worker": "one worker of a run, and the run begins again with a new one",
    "shoal.node.swarm.workers._look_after": "one worker, as above",
    "shoal.node.wire.bench._echo": "one measurement that somebody asked for",
    "shoal.node.wire.bench.load": "one measurement that somebody asked for",
    "shoal.node.wire.bulk._pull_by_lanes": "one transfer",
    "shoal.node.wire.channel._spawn": "one stream, which is a task as a whole",
    "shoal.node.wire.channel.run": "one stream, which is a task as a whole",
    "shoal.node.wire.links.close": "the end of all streams",
}


def unsupervised(modules: Iterable[Module]) -> set[str]:
    """The functions of the node that begin a task in a nursery, or as a system task, and so in no failure domain."""
    found = set()

    def look(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = f"{module.name}.{node.name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            starts = node.func.attr in ("start_soon", "spawn_system_task")
            if starts and not any(keyword.arg == "policy" for keyword in node.keywords):
                found.add(function)
        for child in ast.iter_child_nodes(node):
            look(child, function)

    for module in modules:
        if module.room == "node":
            look(module.tree, module.name)
    return found


def test_every_task_of_the_node_stands_in_a_failure_domain() -> None:
    assert unsupervised(product_modules()) == NURSERIES.keys()


@pytest.mark.parametrize(
    "source", ["nursery.start_soon(run)", "self._nursery.start_soon(run, 1)", "trio.lowlevel.spawn_system_task(run)"]
)
def test_a_task_outside_of_any_failure_domain_is_caught(source: str) -> None:
    assert unsupervised([planted("shoal.node.planted", f"def begin():\n    {source}")]) == {"shoal.node.planted.begin"}


def test_a_task_in_a_failure_domain_is_let_through() -> None:
    source = "def begin():\n    domain.start_soon('a', run, policy=Policy.DROP)"
    assert unsupervised([planted("shoal.node.planted", source)]) == set()


# --- cores are pure --------------------------------------------------------------------------------------------------


def impurities(modules: Iterable[Module]) -> list[str]:
    """Loops, wires, clocks and chance in cores; PyTorch's files in training/ are let off the last two only."""
    found = []
    for module in modules:
        is_core = module.room in ("protocol", "crdt", "dht", "training") or module.name in NODE_CORES
        if not is_core or module.name in WORKER_SHELLS:
            continue
        uses_torch = within(module.name, TORCH_FOLDERS) and mentions([module], ["torch"])
        banned = LOOPS_AND_WIRES if uses_torch else LOOPS_AND_WIRES + CLOCKS_AND_CHANCE
        found += mentions([module], banned, allowed=SEEDED)
    return found


def test_cores_have_no_loop_no_wire_no_clock_and_no_global_random() -> None:
    assert impurities(product_modules()) == []
    assert set(NODE_CORES) <= {module.name for module in product_modules()}


def test_the_cores_of_the_node_know_no_libp2p() -> None:
    assert mentions((module for module in product_modules() if module.name in NODE_CORES), ["libp2p"]) == []


def test_an_impure_core_of_the_node_is_caught() -> None:
    assert impurities([planted("shoal.node.mesh.connections", "import trio")])


@pytest.mark.parametrize(
    "source",
    [
        "import trio",
        "import asyncio.locks",
        "from socket import create_connection",
        "from threading import Lock",
        "import time as clock",
        "from time import monotonic",
        "from datetime import datetime",
        "import random",
        "from random import shuffle",
        "import numpy as np\nnp.random.rand(3)",
        "from numpy import random",
        "import os\nos.urandom(32)",
        "def late():\n    import subprocess",
        "__import__('secrets')",
    ],
)
@pytest.mark.parametrize("room", ["protocol", "crdt", "dht", "training", "training.exchange", "training.tasks"])
def test_an_impure_core_is_caught(room: str, source: str) -> None:
    assert impurities([planted(f"shoal.{room}.planted", source)])


def test_a_loop_in_a_torch_file_is_caught() -> None:
    assert impurities([planted("shoal.training.algorithms.planted", "import torch\nimport trio")])


def test_torch_outside_its_folders_is_no_excuse() -> None:
    assert impurities([planted("shoal.training.exchange.planted", "import torch\nimport time")])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("shoal.dht.planted", "from random import Random\nRandom(7)"),
        ("shoal.training.planted", "import numpy as np\nnp.random.default_rng(7)"),
        ("shoal.training.algorithms.planted", "import torch\nimport time"),
        ("shoal.training.worker", "import socket, time"),
        ("shoal.node.planted", "import trio, time, random"),
    ],
)
def test_seeded_chance_and_shells_are_let_through(name: str, source: str) -> None:
    assert impurities([planted(name, source)]) == []


# --- libp2p in node/ only, PyTorch in training/ only -----------------------------------------------------------------


def libp2p_outside_node(modules: Iterable[Module]) -> list[str]:
    return mentions((module for module in modules if module.room != "node"), ["libp2p"])


def torch_outside_training(modules: Iterable[Module]) -> list[str]:
    return mentions((module for module in modules if module.room != "training"), ["torch"])


def loaded_with_torch(modules: list[str], path: Path | None = None) -> bool:
    """Whether a fresh interpreter that imports some modules has PyTorch in it afterwards."""
    program = """
        import importlib, sys
        sys.path[:0] = filter(None, [sys.argv[1]])
        for name in sys.argv[2:]:
            importlib.import_module(name)
        print("torch" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path or ""), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1] == "True"


def test_only_node_imports_libp2p() -> None:
    assert libp2p_outside_node(product_modules()) == []


def test_libp2p_elsewhere_is_caught() -> None:
    assert libp2p_outside_node([planted("shoal.dht.planted", "from libp2p.kad_dht import KadDHT")])


def test_only_training_imports_torch() -> None:
    assert torch_outside_training(product_modules()) == []


def test_torch_elsewhere_is_caught() -> None:
    assert torch_outside_training([planted("shoal.node.planted", "def late():\n    from torch import nn")])


def test_nothing_that_the_daemon_or_the_cli_imports_loads_torch() -> None:
    modules = [module.name for module in product_modules() if module.room in ("node", "cli")]
    assert not loaded_with_torch([name for name in modules if not name.endswith("__main__")])


def test_nothing_that_a_worker_loads_for_ppo_loads_torch() -> None:
    assert not loaded_with_torch([f"shoal.training.{name}" for name in ("worker", "algorithms.ppo", "tasks.gym")])


def test_torch_loaded_through_another_module_is_caught(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "between.py").write_text("import torch\n")
    (tmp_path / "planted.py").write_text("import between\n")
    assert loaded_with_torch(["planted"], tmp_path)


# --- nothing loads code from bytes -----------------------------------------------------------------------------------


def code_loading(modules: Iterable[Module]) -> list[str]:
    modules = list(modules)
    found = mentions(modules, CODE_LOADERS)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{module.name}:{node.value.lineno} allows pickle")
    return found


def test_nothing_pickles_anywhere() -> None:
    assert code_loading(all_modules()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal, json",
        "def late():\n    import shelve",
        "import dill as json",
        "import cloudpickle",
        "from joblib import load",
        "import importlib\nimportlib.import_module('pickle')",
        "import torch\ntorch.load('x')",
        "import torch as th\nstate = th.load('x', weights_only=True)",
        "from torch import load",
        "import torch.serialization",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_pickling_is_caught(source: str) -> None:
    assert code_loading([planted("benchmarks.planted", source)])


def test_every_folder_with_sources_is_looked_at() -> None:
    seen = {module.name.removeprefix("shoal.").split(".")[0] for module in all_modules()}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders - {".venv", "src", "build", "dist", "node_modules"} <= seen


# --- packaging -------------------------------------------------------------------------------------------------------


def listed_packages(root: Path) -> list[str]:
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return sorted(pyproject["tool"]["setuptools"]["packages"])


def packages_on_disk(root: Path) -> list[str]:
    """Every folder that holds sources, as the package that it would be."""
    folders = {path.parent.relative_to(root) for room in ROOMS for path in (root / room).rglob("*.py")}
    return sorted(["shoal", *(".".join(["shoal", *folder.parts]) for folder in folders)])


def copy_tree(target: Path) -> Path:
    """The parts of the tree that packaging reads, symlinks included."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for name in ("src", *ROOMS):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    return target


def wheel_files(tree: Path) -> set[str]:
    """What a wheel built from a tree would put into site-packages."""
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    out = tree / "dist"
    out.mkdir()
    command = [sys.executable, "-c", program, str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def foreign_names(files: set[str]) -> list[str]:
    tops = {file.split("/")[0] for file in files}
    return sorted(top for top in tops if top != "shoal" and not re.fullmatch(r"shoal-[^/]*\.dist-info", top))


def test_the_packages_listed_are_the_packages_on_disk() -> None:
    assert listed_packages(ROOT) == packages_on_disk(ROOT)
    for name in packages_on_disk(ROOT)[1:]:
        assert (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_a_package_that_nobody_listed_is_caught(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    (tree / "node" / "planted").mkdir()
    (tree / "node" / "planted" / "thing.py").write_text("")
    assert set(packages_on_disk(tree)) - set(listed_packages(tree)) == {"shoal.node.planted"}


def test_every_room_is_linked_for_the_type_checkers_and_mapped_for_the_install() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    mapped = pyproject["tool"]["setuptools"]["package-dir"]
    assert mapped == {"shoal": "src/shoal"} | {f"shoal.{room}": room for room in ROOMS}
    links = {path.name: path.readlink() for path in (ROOT / "src/shoal").iterdir() if path.is_symlink()}
    assert links == {room: Path("../..") / room for room in ROOMS}


def test_an_install_puts_nothing_but_shoal_into_site_packages(tmp_path: Path) -> None:
    files = wheel_files(copy_tree(tmp_path / "tree"))
    assert foreign_names(files) == []
    sources = {f"shoal/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert sources | {"shoal/__init__.py", "shoal/py.typed"} <= files


def test_an_install_that_would_put_a_room_beside_shoal_is_caught(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    pyproject = tree / "pyproject.toml"
    text = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(text.replace('    "shoal.node",\n', '    "shoal.node",\n    "node",\n'), encoding="utf-8")
    assert foreign_names(wheel_files(tree)) == ["node"]


# --- the threat model names tests that exist -------------------------------------------------------------------------


def unproven(page: str) -> list[str]:
    """Of a page that says which test shows what: rows of its tables without a test, and tests that do not exist."""
    found = []
    tests: dict[str, set[str]] = {}
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| attack |")]
    found += [f"no test: {row}" for row in rows if "::" not in row]
    for file, name in re.findall(r"([^\s`|]*)::([^\s`|]*)", page):
        path = ROOT / "tests" / file
        if file not in tests:
            body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
            tests[file] = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if not name.startswith("test_") or name not in tests[file]:
            found.append(f"{file}::{name} does not exist")
    return found


def test_the_threat_model_names_tests_that_exist() -> None:
    page = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
    assert page.count("::") > 50, "it names its tests in another way than is looked for"
    assert unproven(page) == []


@pytest.mark.parametrize(
    "row",
    [
        "| flood | a limit | |",
        "| flood | a limit | `unit/test_structure.py::test_that_nobody_wrote` |",
        "| flood | a limit | `unit/test_nothing.py::test_imports_point_down_only` |",
        "| flood | a limit | `unit/test_structure.py::unproven` |",
        "| flood | a limit | `unit/test_structure.py::test_imports_point_down_only[once]` |",
        "| flood | a limit | `unit/test_structure.py::` |",
        "| flood | a limit | `::test_imports_point_down_only` |",
    ],
)
def test_an_attack_without_a_test_that_exists_is_caught(row: str) -> None:
    head = "| attack | what stops it | test |\n|---|---|---|\n"
    good = f"{head}| garbage | a check | `unit/test_structure.py::test_pickling_is_caught` |\n"
    assert unproven(good) == []
    assert unproven(good + row)


# --- the tools really look -------------------------------------------------------------------------------------------


def ruff_banned_imports(path: str, source: str) -> set[str]:
    """The imports that ruff, as configured here, bans (TID251) in a file at a path of this tree."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format=json",
        "--stdin-filename",
        path,
        "-",
    ]
    done = subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    lines = source.splitlines()
    return {lines[hit["location"]["row"] - 1] for hit in json.loads(done.stdout) if hit["code"] == "TID251"}


@pytest.mark.parametrize("folder", [*ROOMS, "node/api", "tests/unit", "benchmarks"])
def test_ruff_bans_the_rooms_as_top_level_packages_and_pickle(folder: str) -> None:
    banned = [*(f"import {room}" for room in ROOMS), *(f"from {room} import thing" for room in ROOMS), "import pickle"]
    allowed = [f"import shoal.{room}" for room in ROOMS]
    source = "".join(f"{line}\n" for line in banned + allowed)
    assert ruff_banned_imports(f"{folder}/planted.py", source) == set(banned)


def mypy_complaints(tree: Path) -> tuple[int, set[str]]:
    """mypy's exit status and the places of its errors, under the tree's own configuration."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tree / ".cache"), "--no-error-summary"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return done.returncode, set(re.findall(r"^(\S+\.py:\d+): error:.*\[assignment\]$", done.stdout, re.MULTILINE))


def test_a_type_error_in_any_package_makes_mypy_fail(tmp_path: Path) -> None:
    # The real configuration and symlinks, over packages that are empty but for the plant: what is at stake is whether
    # mypy gets to see each folder at all.
    tree = copy_tree(tmp_path / "tree")
    packages = [tree.joinpath(*name.split(".")[1:]) for name in packages_on_disk(tree)[1:]]
    for source in tree.rglob("*.py"):
        source.write_text("")
    assert mypy_complaints(tree) == (0, set())

    for package in packages:
        (package / "planted.py").write_text('number: int = "text"\n')
    expected = {f"src/shoal/{(package / 'planted.py').relative_to(tree)}:1" for package in packages}
    assert mypy_complaints(tree) == (1, expected)
