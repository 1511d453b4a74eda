"""How peers agree on a round and merge what they learned; and `Averager`, which does so for a training loop of yours.

`Averager` loads PyTorch, so it is imported when it is asked for and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.training.loop.averager import Averaged, Averager

__all__ = ["Averaged", "Averager"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from shoal.training.loop import averager

        return getattr(averager, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
