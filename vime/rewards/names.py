"""Names of the built-in rewards; imports nothing, so that a dry run can check `--rm-type` and labels by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltIn:
    """A reward function of vime's own; all of them need a label."""

    target: str
    wrong: float
    """The reward of a wrong answer; a sample whose grading takes too long gets it."""


BUILT_IN: Mapping[str, BuiltIn] = {
    "deepscaler": BuiltIn("vime.rewards.math_answer:deepscaler", 0.0),
    "math": BuiltIn("vime.rewards.math_answer:math", 0.0),
    "dapo": BuiltIn("vime.rewards.math_answer:dapo", -1.0),
    "f1": BuiltIn("vime.rewards.text:f1", 0.0),
    "gpqa": BuiltIn("vime.rewards.text:gpqa", 0.0),
}
BAD_LABEL = "BadLabel"
"""Name of the error of a label that cannot be compared with, in a worker's answer."""
GROUP_PREFIX = "group:"
REMOTE = "remote"
