"""Log-probs of transformers' own models, in a process without Megatron, so that the two share nothing.

As a module: the function that a test calls. As a script (`python reference_log_probs.py FOLDER`): that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

Scored = tuple[Sequence[int], Sequence[int], float]
"""Ids of a prompt and of a response, and a temperature."""


def reference_log_probs(folder: Path, scored: Sequence[Scored]) -> list[list[float]]:
    """Of every response its tokens' log-probs in fp32."""
    from tests.support import patience  # the script has no path to it

    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        input=json.dumps(scored),
        capture_output=True,
        text=True,
        timeout=patience.GROUP,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def main(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, response, temperature in json.load(sys.stdin):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        column = torch.tensor(response)[:, None]
        found.append((logits / temperature).log_softmax(-1).gather(-1, column)[:, 0].tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
