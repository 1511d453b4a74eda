"""An assertion that fails in what tests share tells its values, as one in a test does."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.unit.channels", "tests.unit.connections")
