"""Shell commands of README and docs, with their requirements: the words after `bash` on the fence of their block.

| fence | the test runs it |
|---|---|
| `bash` | as is, on a login node without Slurm |
| `bash run` | in a place where a finished run is recorded |
| `bash cluster` | with `--dry-run`: it would start the run that it describes |
| `bash tiny` | with the tiny checkpoint in `$BASE_DIR` |
| `bash slurm` | on the development cluster |
| `bash gpus` | on the development cluster, which refuses only because it has no GPUs |
| `bash install` | into a separate folder |
| `bash network` | only its program's `--help`: it would download, or needs a trained checkpoint |
| `bash suite` | not here: other tests run quickstart.sh and release.py, and these tests run inside test.sh |
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import patience

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
KINDS = ("", "run", "cluster", "tiny", "slurm", "gpus", "install", "network", "suite")
_FENCE = re.compile(r"^```bash([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of commands."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands, one a line; continued lines are joined, comments left out."""
        joined = self.text.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    """The blocks of these kinds, of all pages; all without a kind given."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match[1].strip(), match[2]))
    return [block for block in found if not kinds or block.kind in kinds]


def person(home: Path, **more: str) -> dict[str, str]:
    """The environment of somebody who has activated the project's environment and has no settings yet."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    base = {"PATH": path, "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "LANG": "C.UTF-8"}
    return {**base, **more}


def run(text: str, env: dict[str, str], *, limit_s: float = patience.PROCESS) -> subprocess.CompletedProcess[str]:
    """A block as one script, ended at its first failure."""
    script = f"set -euo pipefail\n{text}"
    return subprocess.run(["bash", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)


def with_dry_run(command: str) -> str:
    """The submission with --dry-run, before the recipe's flags."""
    own, mark, flags = command.partition(" -- ")
    return f"{own} --dry-run{mark}{flags}"
