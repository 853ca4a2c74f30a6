"""Secrets kept out of what is shown, logged or shared: by the names of keys, and inside URLs. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = "***"
"""Stands in the place of a secret."""
_WORD = r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:API|ACCESS|SECRET|PRIVATE|AUTH)[_-]?KEY"
_NAME = re.compile(rf"(?:^|[_.-])(?:{_WORD})(?:_ID)?$|(?<=[a-z])(?:Token|Secret|Password|ApiKey|AccessKey)$", re.I)
_USER = re.compile(r"(?<=://)[^/?#\s@'\"<>]+@")
_QUERY = re.compile(rf"(?<=[?&;])((?:[\w.-]*[_.-])?(?:{_WORD}|KEY|SIG|SIGNATURE)=)[^&;#\s'\"<>]+", re.I)
_QUOTE = "['\"]|&quot;|&#x27;"
_ASSIGNED = re.compile(
    rf"\b([A-Z][A-Z0-9_]*_)?({_WORD})((?:{_QUOTE})?\s?[=:]\s?)"
    r"(?:'[^'\n]*'|\"[^\"\n]*\"|&quot;.*?&quot;|&#x27;.*?&#x27;|[^\s'\",;&}]+)"
)
"""`NAME_TOKEN=…`, `"NAME_TOKEN": "…"`, also escaped for HTML."""
_BEARER = re.compile(r"\b(Bearer\s+)[A-Za-z0-9._~+/=-]{8,}")


def is_secret(name: str) -> bool:
    """True for the name of a variable or option whose value is a secret, such as WANDB_API_KEY or HF_TOKEN."""
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """Text without user and password of URLs, their secret parameters, `NAME_TOKEN=…` and bearer tokens."""
    text = _USER.sub(f"{SHOWN}@", text)
    text = _QUERY.sub(rf"\g<1>{SHOWN}", text)
    text = _ASSIGNED.sub(_assigned, text)
    return _BEARER.sub(rf"\g<1>{SHOWN}", text)


def redacted(value: Any, name: str = "") -> Any:
    """A JSON value with its secrets replaced; `name` is the key under which it stands."""
    if isinstance(value, Mapping):
        return {key: redacted(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, str):
        return SHOWN if is_secret(name) and value else redact(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [redacted(entry, name) for entry in value]
    return value


def has_secret(name: str, value: str) -> bool:
    """True where the value of a variable must not be shown as it is."""
    return redacted(value, name) != value


def _assigned(match: re.Match[str]) -> str:
    return f"{match[1] or ''}{match[2]}{match[3]}{SHOWN}"
