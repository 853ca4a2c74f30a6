"""The dry run of the full DeepSeek-R1 recipe against its limit of one second, with what Python alone takes beside it.

    python tools/bench/dry_run.py [--times 5]

Both are whole processes, one after the other in turn; the best of each counts, since others share the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

LIMIT_S = 1.0
DRY_RUN = ("-m", "vime.submit", "--nodes", "16", "--dry-run", "--base-dir")
BARE = ("-c", "pass")


def wall(*words: str) -> float:
    """Seconds of a Python process from its start to its end. Raises CalledProcessError."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(wall(*DRY_RUN, folder), wall(*BARE)) for _ in range(args.times)]
    dry, bare = (min(column) for column in zip(*pairs, strict=True))
    print(f"dry run {dry:.3f} s, an empty Python process {bare:.3f} s")
    print(f"dry run / limit of {LIMIT_S:g} s: {dry / LIMIT_S:.3f} (at most 1)")
    return 0 if dry <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
