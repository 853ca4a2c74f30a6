"""Text that others wrote (models, logs, host names), made safe to show."""

from __future__ import annotations

import re
from typing import Any

# C0 and C1 control characters but newline and tab; directional overrides and isolates, which can disguise a text;
# lone surrogates, which cannot be encoded.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(value: Any) -> str:
    """The text of a value, with control characters and directional overrides as `\\uXXXX`.

    Safe for a terminal: no escape sequence is left. None becomes empty; newlines and tabs stay.
    """
    text = "" if value is None else str(value)
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
