"""``python -m shoal.training.tasks FD -- TASK ALGORITHM [ARGUMENTS]``: what such a run needs, as JSON into a file.

The file is given by its descriptor. What it says is the task's own target, and the versions that are installed here; or
why there can be no such run. A node asks in a process of its own, because their packages may be heavy and are none of
the node's business. What the packages print goes to where this process prints, and not into the answer. The process
goes with the node that asks, and takes along what it started (`shoal.training.keeper`).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from shoal.training import watch
from shoal.training.keeper import alone


def main() -> None:
    """Answer what `LookedUp` says, or ``{"error": …}``."""
    descriptor, _, task_name, algorithm_name, *more = sys.argv[1:]
    arguments = json.loads(more[0]) if more else {}
    alone(lambda: _answer(int(descriptor), task_name, algorithm_name, arguments), closing=int(descriptor))


def _answer(descriptor: int, task_name: str, algorithm_name: str, arguments: dict[str, Any]) -> None:
    place = f"the task {task_name}"

    def tell(answer: dict[str, object]) -> None:
        with suppress(OSError):
            os.write(descriptor, json.dumps(answer).encode())

    watch.begin(None, lambda words: tell({"error": f"{place} {words}: {_place()}"}))
    tell(_look_up(task_name, algorithm_name, arguments))


def _place() -> str:
    return watch.place_of(watch.page[watch.Slot.PLACE])[0].words


def _look_up(task_name: str, algorithm_name: str, arguments: dict[str, Any]) -> dict[str, object]:
    from shoal.protocol.errors import ShoalError
    from shoal.training.algorithms import load_algorithm
    from shoal.training.requirements import requirements
    from shoal.training.tasks import load_task
    from shoal.training.tasks.failures import in_words

    try:
        task, algorithm = load_task(task_name, arguments), load_algorithm(algorithm_name)
        try_out = getattr(task, "try_out", None)
        if try_out is not None:
            try_out(0)
        return {
            "target_return": task.target_return,
            "requires": requirements(algorithm_name, algorithm.version, task_name, task.version),
            "defaults": dict(getattr(algorithm, "run_defaults", {})) | getattr(task, "run_defaults", {}),
        }
    except ShoalError as error:
        return {"error": str(error)}
    except BaseException as error:  # other people's code
        return {"error": f"the task {task_name} fails when it is made: {in_words(error)}"}


if __name__ == "__main__":
    main()
