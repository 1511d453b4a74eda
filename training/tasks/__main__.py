"""``python -m shoal.training.tasks TASK ALGORITHM``: what a run of both needs, as JSON.

That is the task's own target, and the versions that are installed here; or why there can be no such run. A node
asks in a process of its own, because their packages may be heavy and are none of the node's business.
"""

from __future__ import annotations

import json
import sys

from shoal.protocol.errors import ShoalError
from shoal.training.algorithms import load_algorithm
from shoal.training.requirements import requirements
from shoal.training.tasks import load_task


def main() -> None:
    """Print ``{"target_return": …, "requires": {…}}`` or ``{"error": …}``."""
    task_name, algorithm_name = sys.argv[1:]
    try:
        task, algorithm = load_task(task_name), load_algorithm(algorithm_name)
        answer: dict[str, object] = {
            "target_return": task.target_return,
            "requires": requirements(algorithm_name, algorithm.version, task_name, task.version),
        }
    except ShoalError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
