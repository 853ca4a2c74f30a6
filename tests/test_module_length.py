"""A long module says in its docstring why it is one."""

from __future__ import annotations

import ast
from pathlib import Path

import vime

LONG = 400
"""Lines at which to look for a seam."""
ROOT = Path(vime.__file__).parent


def test_a_module_over_400_lines_states_its_reason() -> None:
    silent = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        about = ast.get_docstring(ast.parse(text)) or ""
        if text.count("\n") > LONG and "One module since" not in about:
            silent.append(str(path.relative_to(ROOT)))
    assert not silent, f'split at a seam, or say "One module since …" in the docstring: {silent}'
