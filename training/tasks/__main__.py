"""``python -m shoal.training.tasks TASK ALGORITHM``: whether both are installed, and the task's own target, as JSON.

A node asks in a process of its own, because a task's packages may be heavy and are none of the node's business.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

from shoal.protocol.errors import ShoalError, UsageError
from shoal.training.tasks import load_task


def main() -> None:
    """Print ``{"target_return": …}`` or ``{"error": …}``."""
    task_name, algorithm = sys.argv[1:]
    try:
        algorithms = sorted(importlib.metadata.entry_points(group="shoal.algorithms").names)
        if algorithm not in algorithms:
            raise UsageError(f"there is no algorithm {algorithm[:80]!r}; installed: {', '.join(algorithms)}")
        answer: dict[str, object] = {"target_return": load_task(task_name).target_return}
    except ShoalError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
