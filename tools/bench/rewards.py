"""Verdicts of the math rewards against the corpus of `tests/rewards/corpus`, and what they cost.

    python tools/bench/rewards.py [--times 3] [--json FILE]

Four graders judge the same pairs in one process: vime's rewards; math-verify alone, as its documentation uses it; the
last box or number as text; and the same without spaces and the usual dressing of LaTeX. Agreement is the share of pairs
with the corpus's verdict; multiple choice is left out where a grader has no rule for it. Speed is verdicts a second of
processor time, best of `--times`, with the graders' own time limits off and an alarm of 10 s around each verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Never

from math_verify import parse, verify

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from vime.rewards import math_answer, text  # noqa: E402
from vime.rewards.extract import last_boxed  # noqa: E402
from vime.samples import Sample  # noqa: E402

CORPUS = ROOT / "tests" / "rewards" / "corpus"

LIMIT_SECONDS = 10.0
LEAST_AGREEMENT = 0.995


@dataclass(frozen=True)
class Pair:
    """A row of the corpus: `+` or `-`, answer and label, in a file named after its reward and kind."""

    reward: str
    response: str
    label: str
    right: bool


Grader = Callable[[Pair], bool]


def corpus() -> list[Pair]:
    pairs = []
    for path in sorted(CORPUS.glob("*.tsv")):
        how = path.stem.partition("-")[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            sign, answer, label = line.replace("⏎", "\n").split("\t")
            response = f"\\boxed{{{answer}}}" if how == "boxed" else answer
            pairs.append(Pair("math" if how == "boxed" else how, response, label, sign == "+"))
    return pairs


def by_vime(pair: Pair) -> bool:
    """The reward that the kind is for."""
    function = getattr(text if pair.reward == "gpqa" else math_answer, pair.reward)
    return function(Sample(0, 0, "?", [1], label=pair.label, response=pair.response)) > 0


def by_math_verify(pair: Pair) -> bool:
    """Both texts parsed with the library's defaults, the label as LaTeX."""
    gold = parse(f"${pair.label}$", parsing_timeout=0)
    return bool(verify(gold, parse(pair.response, parsing_timeout=0), timeout_seconds=0))


def by_text(pair: Pair) -> bool:
    """The last box, or else the last number, is the label."""
    return _final(pair.response) == pair.label.strip()


def by_bare_text(pair: Pair) -> bool:
    """The same without dollars, spaces, text commands and thousands separators."""
    return _bare(_final(pair.response)) == _bare(pair.label)


def _final(text: str) -> str:
    boxed = last_boxed(text)
    numbers = re.findall(r"-?\d[\d,.]*", text)
    return boxed.strip() if boxed is not None else numbers[-1].strip(".,") if numbers else text.strip()


def _bare(text: str) -> str:
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("\\left", "").replace("\\right", "")
    return re.sub(r"\\text\{.*?\}|\\[,!;: ]|\\%|%|\\?\$|[\s,{}]", "", text).rstrip(".")


GRADERS: dict[str, Grader] = {
    "vime": by_vime,
    "math-verify": by_math_verify,
    "text": by_text,
    "bare text": by_bare_text,
}


class TimeUp(BaseException):
    """Raised by the alarm."""


def _time_up(_signal: int, _frame: FrameType | None) -> Never:
    raise TimeUp


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    signal.signal(signal.SIGALRM, _time_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def judge(grader: Grader, pair: Pair) -> bool | None:
    """The verdict; None where the grader raises or does not end."""
    try:
        with alarm(LIMIT_SECONDS):
            return grader(pair)
    except TimeUp:
        return None
    except Exception:  # noqa: BLE001 -- a grader that raises has given no verdict, whatever it raises
        return None


def measure(grader: Grader, pairs: Sequence[Pair], times: int) -> dict[str, float]:
    """Agreement with the corpus, verdicts missing, verdicts a second of processor time."""
    verdicts = [judge(grader, pair) for pair in pairs]
    seconds = []
    for _ in range(times):
        started = time.process_time()
        for pair in pairs:
            judge(grader, pair)
        seconds.append(time.process_time() - started)
    return {
        "pairs": len(pairs),
        "agreement": sum(verdict is pair.right for verdict, pair in zip(verdicts, pairs, strict=True)) / len(pairs),
        "wrongly right": sum(v is True and not p.right for v, p in zip(verdicts, pairs, strict=True)),
        "wrongly wrong": sum(v is not True and p.right for v, p in zip(verdicts, pairs, strict=True)),
        "none": sum(verdict is None for verdict in verdicts),
        "verdicts/s": len(pairs) / min(seconds),
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--times", type=int, default=3, help="measured passes over the corpus; the best one counts")
    arguments.add_argument("--json", type=Path, help="file for the figures")
    options = arguments.parse_args()
    logging.disable(logging.CRITICAL)
    math_answer.prepare()
    pairs = corpus()
    maths = [pair for pair in pairs if pair.reward != "gpqa"]
    figures = {"vime, all kinds": measure(by_vime, pairs, options.times)}
    figures |= {name: measure(grader, maths, options.times) for name, grader in GRADERS.items()}
    columns = list(figures["vime"])
    print(f"{'':16}" + "".join(f"{column:>15}" for column in columns))
    for name, row in figures.items():
        cells = (f"{row[column]:.2%}" if column == "agreement" else f"{row[column]:.0f}" for column in columns)
        print(f"{name:16}" + "".join(f"{cell:>15}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    good = figures["vime, all kinds"]["agreement"] >= LEAST_AGREEMENT
    good = good and figures["vime"]["verdicts/s"] >= figures["math-verify"]["verdicts/s"]
    print("holds" if good else "does not hold", "(at least 99.5 %, and no slower than math-verify alone)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
