"""Time until Chromium has opened the report of a run with long samples, and searched it.

    python tools/bench/report.py [--rollouts 60] [--tokens 32768] [--repeats 3]

The run is made of random words, four samples a rollout, four characters a token. Each opening is timed against an empty
page in the same browser. Exits 1 if the report takes 2 s or more to open.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vime.observe.samples import write_samples
from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.report import write_report
from vime.run.folder import write_plan
from vime.run.metrics import METRICS_FILE
from vime.samples import Group, Rollout, Sample, Status

LIMIT_S = 2.0
LAST = "lastword"
"""At the end of one sample a rollout."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000",
)  # fmt: skip


def make_run(folder: Path, rollouts: int, tokens: int) -> Path:
    """A run folder with this many rollouts, whose samples have this many tokens."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz<&", k=draw.randint(2, 9))) for _ in range(5000)]
    checks = Checks(inputs=False, run_folder=False)
    run = folder / "run"
    run.mkdir()
    recipe, cluster = load_recipe("deepseek-r1"), load_cluster("example")
    plan = make_plan(recipe, cluster=cluster, nodes=16, base_dir=folder, run_dir=run, run_name="bench", checks=checks)
    write_plan(plan)
    for number in range(rollouts):
        group = Group(number, [])
        for place in range(4):
            text = " ".join(draw.choices(words, k=tokens * 4 // 6))[: tokens * 4]
            text += f" {LAST}" * (place == 3)
            group.samples.append(
                Sample(
                    4 * number + place, number, "What is the answer?", [1], label="42", response=text,
                    response_ids=[7] * tokens, reward=float(place % 2), status=Status.COMPLETED,
                )
            )  # fmt: skip
        write_samples(run, Rollout(number, [group]))
    # A report shows the samples of rollouts that have metrics.
    lines = (json.dumps({"step": n, "time": 1.7e9 + n, "rollout/raw_reward": 0.5}) + "\n" for n in range(rollouts))
    (run / METRICS_FILE).write_text("".join(lines))
    return run


def cost(browser: str, address: str, folder: Path) -> tuple[float, float]:
    """Wall and processor seconds of the browser from its start to a picture of the opened page."""
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}", address]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def found(browser: str, address: str, folder: Path) -> int:
    """Samples that the page's search has found. Not timed: printing the document takes longer than opening it."""
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", address]
    text = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    match = re.search(r'data-found="(\d+)"', text)
    return int(match[1]) if match else -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    browser = shutil.which("chromium")
    if browser is None:
        parser.error("chromium is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder, options.rollouts, options.tokens)
        start = time.monotonic()
        write_report(run)
        written = time.monotonic() - start
        page = (run / "report.html").as_uri()
        size = (run / "report.html").stat().st_size
        assert found(browser, page, folder) == 4 * options.rollouts
        assert found(browser, f"{page}#search={LAST}", folder) == options.rollouts
        addresses = {"an empty page": "about:blank", "the report": page, "opened and searched": f"{page}#search={LAST}"}
        best: dict[str, tuple[float, float]] = {}
        for _ in range(options.repeats):
            for label, address in addresses.items():
                here = cost(browser, address, folder)
                best[label] = min(best.get(label, here), here)
    empty = best["an empty page"]
    seconds = best["the report"][0] - empty[0]
    text = 4 * options.rollouts * options.tokens * 4
    print(f"{options.rollouts} rollouts, {text / 1e6:.0f} MB of text: report of {size / 1e6:.1f} MB in {written:.1f} s")
    for label, (wall, processor) in best.items():
        print(f"{label}: {wall:.2f} s, {processor:.2f} s of a processor")
    print(f"the report opens in {seconds:.2f} s more than an empty page (under {LIMIT_S:g} s)")
    return 0 if seconds < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
