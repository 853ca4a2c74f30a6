"""Two runs that need the same conversion at the same time: one makes it, the other waits and takes it over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import patience
from tests.support.launch_stub import folder, make_plan, stub
from vime.run.journal import read_events

RUN = "import sys; from vime.schedulers import local; from vime.run.folder import read_plan; "
RUN += "sys.exit(local.run(read_plan(sys.argv[1])))"


def test_the_same_conversion_is_made_once(tmp_path: Path) -> None:
    source, output, count = tmp_path / "fp8", tmp_path / "base" / "bf16", tmp_path / "count"
    source.mkdir()
    (source / "model").write_text("weights")
    code = (
        f"import pathlib, time; open({str(count)!r}, 'a').write('made\\n'); time.sleep(3); "
        f"p = pathlib.Path({str(output)!r}); p.mkdir(); (p / 'model').write_text('cast')"
    )
    stage = stub("cast", code, inputs=(folder("in", source),), outputs=(folder("out", output),))
    plans = [make_plan(tmp_path / name, [stage]) for name in ("one", "two")]
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    runs = [subprocess.Popen([sys.executable, "-c", RUN, plan.run_dir], env=env) for plan in plans]
    assert [run.wait(timeout=patience.PROCESS) for run in runs] == [0, 0]
    assert count.read_text() == "made\n"
    kinds = sorted(event.kind for plan in plans for event in read_events(plan.run_dir) if event.stage == "cast")
    assert kinds == ["stage-end", "stage-skip", "stage-start"]
