"""What unit tests share: an assertion that fails in it tells its values, as one in a test does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# As a worker has it; several threads only get into each other's way with arrays as small as a test's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.unit.channels", "tests.unit.connections")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch likewise."""
    import torch  # most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
