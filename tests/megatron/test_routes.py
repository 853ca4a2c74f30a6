"""Routes to experts are those of the pass that recorded them, in forward passes and in recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.route_problem import FULL, Problem
from tests.support.single import one_process
from vime.errors import VimeError


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "recomputed"])
def test_a_replayed_pass_routes_as_the_recorded_one_though_routers_have_moved(options: dict[str, Any]) -> None:
    with one_process() as layout:
        problem = Problem(layout, **options)
        plain, recorded = problem.log_probs(), problem.log_probs(problem.routes.recording)
        assert torch.equal(plain, recorded)
        expected = problem.gradients()
        assert problem.routes.bytes > 0
        problem.move_routers()
        assert not torch.allclose(problem.log_probs(), recorded)
        assert torch.equal(problem.log_probs(problem.routes.replaying), recorded)
        found = problem.gradients(problem.routes.replaying)
        for name, gradient in expected.items():
            assert torch.equal(gradient, found[name]), name
        problem.optimizer.close()


def test_routes_that_were_not_recorded_or_were_forgotten_are_an_error() -> None:
    with one_process() as layout:
        problem = Problem(layout)
        problem.log_probs(problem.routes.recording)
        problem.routes.forget()
        with pytest.raises(VimeError, match="no routes were recorded of micro-batch 0 of step 0"):
            problem.log_probs(problem.routes.replaying)
        problem.optimizer.close()
