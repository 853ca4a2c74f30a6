"""Calls to all actors of a group: results in order, the first error, and who did not end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vime.errors import DeadlineExceeded
from vime.train.actors import _all


async def after(seconds: float, result: Any = None) -> Any:
    await asyncio.sleep(seconds)
    if isinstance(result, Exception):
        raise result
    return result


async def test_results_come_in_the_order_of_the_actors() -> None:
    assert await _all("call", [after(0.02, "a"), after(0.0, "b")], 5) == ["a", "b"]


async def test_the_first_error_ends_the_call() -> None:
    with pytest.raises(ValueError, match="rank 1"):
        await _all("call", [after(30), after(0.0, ValueError("rank 1"))], 5)


async def test_a_call_that_takes_too_long_names_who_did_not_end() -> None:
    with pytest.raises(DeadlineExceeded, match=r"trainer train did not end within 0 s on 2 of 4 actors \(1, 3\)"):
        await _all("trainer train", [after(0), after(30), after(0), after(30)], 0.2)
