from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with everything in its path that breaks careless quoting."""
    return tmp_path / 'it\'s a "run" & größe $HOME'
