"""Training metrics as TensorBoard's event files: ``tensorboard --logdir`` of a run's folder shows how it goes.

Written as they come, in the worker's own thread: TensorBoard's usual writers have a thread and a queue, and when the
disk is full their thread dies and their queue stops whoever trains. Here a failed write ends the noting of metrics
with a line in the log, and nothing else.

tensorboardX loads PyTorch where it is installed, to draw graphs of its modules. Nothing of that is needed here, and an
algorithm that does without PyTorch is not to pay for it with a second and a half and 180 MB of every worker: so
tensorboardX is told that there is none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_is_hidden = "torch" not in sys.modules
if _is_hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python is told that a module cannot be imported
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _is_hidden:
        del sys.modules["torch"]

log = logging.getLogger(__name__)


class Events:
    """One file of events in a folder; a worker that comes after another adds a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self.has_failed = False

    def write(self, values: Mapping[str, float], *, env_steps: int, at: float) -> None:
        """Note numbers.

        Args:
            values: by name; TensorBoard groups them by what stands before the first slash.
            env_steps: by all learners together: where on the horizontal axis they belong.
            at: Unix seconds.
        """
        if self.has_failed or not values:
            return
        parts = [Summary.Value(tag=name, simple_value=value) for name, value in sorted(values.items())]
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._folder / "events"))
            self._writer.write_event(Event(wall_time=at, step=env_steps, summary=Summary(value=parts)))
            self._writer.flush()
        except OSError as error:
            self.has_failed = True
            log.warning("metrics cannot be written to %s (%s); the run goes on without", self._folder, error)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None and not self.has_failed:
            self._writer.close()
        self._writer = None
