"""Functions of the tables in `vime.recipe.algorithms` and of plug-ins, loaded once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vime.errors import BadInput
from vime.rewards.worker import load


@functools.cache
def function_of(target: str, flag: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises BadInput under the flag that gave it."""
    try:
        return load(target)
    except BadInput as error:
        raise BadInput(f"{flag}: {error}") from error
