"""The kind of a failure, as Ray hands it to the driver."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from vime.errors import BadInput, Cause, DeadlineExceeded
from vime.train.__main__ import cause_of


def through_ray(error: Exception) -> BaseException:
    """What a remote call raises: an exception of a class made of Ray's and of the error's own."""
    return RayTaskError("f", "traceback", error).as_instanceof_cause()


def test_an_error_keeps_its_cause_through_ray_and_groups() -> None:
    assert cause_of(through_ray(DeadlineExceeded("late"))) is Cause.DEADLINE
    assert cause_of(through_ray(BadInput("wrong"))) is Cause.BAD_INPUT
    assert cause_of(ExceptionGroup("tasks", [through_ray(DeadlineExceeded("late"))])) is Cause.DEADLINE
    assert cause_of(through_ray(ValueError("broken"))) is Cause.CODE_ERROR
