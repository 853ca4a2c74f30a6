"""The corpus of `tests/rewards/corpus`: answers and labels with their mathematically correct verdicts.

File names are `<how>-<kind>.tsv`; `how` is a reward, or `boxed` for the content of a box that `math` grades. A row is
`+` or `-`, answer and label, separated by tabs, with `⏎` for a new line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vime.rewards import math_answer, text
from vime.samples import Sample

FOLDER = Path(__file__).resolve().parents[1] / "rewards" / "corpus"


@dataclass(frozen=True)
class Pair:
    """One row."""

    kind: str
    reward: str
    response: str
    label: str
    right: bool

    def verdict(self) -> bool:
        """Verdict of vime's reward."""
        function = getattr(text if self.reward == "gpqa" else math_answer, self.reward)
        return function(Sample(0, 0, "?", [1], label=self.label, response=self.response)) > 0


def corpus() -> list[Pair]:
    """Every pair, by kind."""
    pairs = []
    for path in sorted(FOLDER.glob("*.tsv")):
        how, _, kind = path.stem.partition("-")
        for line in path.read_text(encoding="utf-8").splitlines():
            sign, answer, label = line.split("\t")
            answer = answer.replace("⏎", "\n")
            response = f"\\boxed{{{answer}}}" if how == "boxed" else answer
            pairs.append(Pair(kind, "math" if how == "boxed" else how, response, label, sign == "+"))
    return pairs
