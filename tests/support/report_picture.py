"""Writes docs/report.png: the first screen of a synthetic run's report, as rendered by Chromium.

python -m tests.support.report_picture
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.support.browser import open_page
from tests.support.synthetic import synthetic_run
from vime.report import write_report

TARGET = Path(__file__).parents[2] / "docs" / "report.png"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = synthetic_run(folder, 200, name="deepseek-r1-math", text="")
        write_report(run)
        shot = folder / "shot.png"
        open_page((run / "report.html").as_uri(), folder, f"--screenshot={shot}", "--window-size=1240,1000")
        Image.open(shot).convert("RGB").quantize(200).save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
