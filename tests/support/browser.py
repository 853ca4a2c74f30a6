"""Debian's Chromium, headless, for tests and pictures of the report."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support import patience

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000",
)  # fmt: skip


def open_page(address: str, folder: Path, *options: str, limit_s: float = patience.PROCESS) -> str:
    """Output of the browser for a page; its profile is kept in `folder`. Fails where Chromium is missing."""
    browser = shutil.which("chromium")
    assert browser, "tools/test.sh installs Debian's chromium when it is root; install it or run tools/test.sh --fast"
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'browser-profile'}", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True).stdout
