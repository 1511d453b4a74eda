"""The daemon's log: human lines in a file of bounded size, and on stderr when somebody is watching."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any, Final

from shoal.node.store.files import make_own_folder, open_own, storage_error

MAX_BYTES: Final = 4 * 1024 * 1024
KEPT_FILES: Final = 3
_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# They report every stream and every record at these levels.
_QUIETER: Final = {
    "libp2p": logging.ERROR,
    "libp2p.network.swarm": logging.CRITICAL,
    "hypercorn": logging.WARNING,
    "zeroconf": logging.ERROR,
}


class _OwnFile(logging.handlers.RotatingFileHandler):
    """Opens no file but this user's own, and that for nobody else."""

    def _open(self) -> Any:
        descriptor = open_own(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.fchmod(descriptor, 0o600)
        return open(descriptor, self.mode, encoding=self.encoding)  # noqa: PTH123  a descriptor


def set_up_logging(path: Path, *, foreground: bool) -> None:
    """Send all reports of this process to the profile's log, and warnings to stderr when in the foreground.

    ``SHOAL_LOG`` names another level than ``INFO`` for Shoal's own reports.

    Raises:
        ShoalError: if the log cannot be written.
    """
    make_own_folder(path.parent)
    try:
        file = _OwnFile(path, maxBytes=MAX_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
    except OSError as error:
        raise storage_error(path, error) from error
    file.setFormatter(logging.Formatter(_FORMAT))
    handlers: list[logging.Handler] = [file]
    if foreground:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        handlers.append(terminal)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    level = logging.getLevelNamesMapping().get(os.environ.get("SHOAL_LOG", "INFO").upper(), logging.INFO)
    logging.getLogger("shoal").setLevel(level)
    for name, quiet in _QUIETER.items():
        logging.getLogger(name).setLevel(quiet)
        logging.getLogger(name).propagate = True  # libp2p turns that off, and its errors end in stderr
    logging.captureWarnings(capture=True)
