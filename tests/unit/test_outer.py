"""The outer step is Nesterov's, ends in the same bits for all, and takes over no momentum that no averages lead to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.training.exchange.outer import Outer


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_it_is_nesterovs_as_torch_takes_it(momentum: float) -> None:
    import torch

    rng = np.random.default_rng(3)
    parameters = rng.normal(size=50).astype(np.float32)
    outer = Outer(50, learning_rate=0.7, momentum=momentum, max_gradient=10.0)
    theirs = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    optimiser = torch.optim.SGD([theirs], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for _ in range(20):
        gradient = rng.normal(size=50).astype(np.float32)
        outer.apply(parameters, gradient)
        theirs.grad = torch.from_numpy(gradient)
        optimiser.step()
    np.testing.assert_allclose(parameters, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_without_momentum_and_with_a_rate_of_one_it_is_the_average_of_what_all_came_to() -> None:
    rng = np.random.default_rng(4)
    start = rng.normal(size=50).astype(np.float32)
    ends = start + rng.normal(0, 0.01, (3, 50)).astype(np.float32)
    parameters = start.copy()
    Outer(50, learning_rate=1.0, momentum=0.0, max_gradient=1.0).apply(parameters, (start - ends).mean(axis=0))
    np.testing.assert_allclose(parameters, ends.mean(axis=0), atol=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), momentum=st.floats(0.0, 0.99))
def test_what_honest_averages_lead_to_is_never_refused(seed: int, momentum: float) -> None:
    outer = Outer(3, momentum=momentum, max_gradient=0.5)
    rng = np.random.default_rng(seed)
    parameters = np.zeros(3, np.float32)
    always = rng.choice([-0.5, 0.5], 3).astype(np.float32)
    for _ in range(300):
        outer.apply(parameters, always)
        outer.check(outer.momentum)
    with pytest.raises(ProtocolError, match="outer momentum"):
        outer.check(outer.momentum + np.float32(1.1 * 0.5 / (1 - momentum)) * np.sign(always))
    with pytest.raises(ProtocolError, match="outer momentum"):
        outer.check(np.full(3, np.nan, np.float32))
