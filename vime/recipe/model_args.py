"""Megatron model flags given by hand, compared with what the checkpoint's config says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vime.errors import BadInput
from vime.recipe.flags import flag


def check_model_args(given: Mapping[str, Any], config: Any) -> None:
    pass
