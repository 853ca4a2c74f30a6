"""Fixtures shared by the tests of the rollout."""

import json

import pytest

from tests.support import patience
from tests.support.plans import plan_of


@pytest.fixture
def sums(tmp_path):
    """A prompt set of sums `a+b=`; a function that makes a plan of it with flags on top."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in range(8) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*flags: str, nodes: int = 1):
        base = ("--prompt-data", str(path), "--rm-type", "reward_plugins:right", "--rollout-batch-size", "6")
        base += ("--over-sampling-batch-size", "8", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "8")
        base += ("--num-steps-per-rollout", "1", "--eval-prompt-data", "sums", str(path))
        base += ("--dynamic-sampling-filter-path", "none", "--no-rollout-shuffle")
        base += ("--rollout-timeout", str(patience.ANSWER))
        return plan_of("tiny-qwen3", *base, *flags, nodes=nodes, run_dir=tmp_path)

    return make
