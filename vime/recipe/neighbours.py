"""Flags of neighbouring trainers and of their launch scripts, and what stands for each of them here."""

from __future__ import annotations

ALWAYS_SO: dict[str, str] = {
    "balance_data": "the shares of the data-parallel ranks are always balanced by their cost",
}
"""Switches for what vime always does: taken with a note that says so."""
