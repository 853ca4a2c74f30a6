"""Waits of the tests take their seconds from tests/support/patience.py; what has its own says here why."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience
from vime.errors import BadInput

ROOT = Path(__file__).parents[1]
KEYWORDS = {"timeout", "timeout_s", "within_s", "deadline", "deadline_s", "limit_s"}
POSITIONS = {
    "communicate": (0,), "ends_with_everything": (1,), "goes_on": (0,), "join": (0,), "slurm_state": (0,),
    "until_said": (2,), "wait": (0, 1), "wait_for": (1,), "wait_for_all": (1,), "wait_for_end": (1,),
    "wait_for_event": (2,), "wait_ready": (0,), "wait_until": (1,),
}  # fmt: skip
"""Places of the seconds among a waiting helper's arguments."""

RUNS_OUT = "a deadline that the test lets run out"
NEVER = "never starts: only its plan is looked at"
ALLOWED = {
    "tests/launch/test_controller.py": {
        "deadline_s=0.5": RUNS_OUT,
        "deadline_s=1.5": RUNS_OUT,
        "time.monotonic() - begin < 20": "the machine is given up after 28 s, and the run must have ended well before",
    },
    "tests/rewards/test_rewards.py": {"limit_s=0.2": RUNS_OUT},
    "tests/rollout/test_client.py": {"deadline_s=0.3": RUNS_OUT},
    "tests/rollout/test_engine.py": {"server.wait_ready(1)": RUNS_OUT},
    "tests/run/test_chain.py": {"deadline_s=1000": NEVER, "deadline_s=100 * 3600": NEVER},
    "tests/schedulers/test_submit_text.py": {"deadline_s=10 ** 6": NEVER},
    "tests/support/worker_cases.py": {"time.monotonic() + PORT_DEADLINE": "who starts the ranks ends them before"},
    "tests/sync/test_session.py": {"deadline=0.2": RUNS_OUT},
    "tests/system/test_guarded_store.py": {
        "time.monotonic() - begin < len(strangers) * 0.3 / 2": "half of what a store that took them in turn would take",
    },
}
"""By module: the argument as it is written, and why it is no patience."""


def _constants(tree: ast.Module) -> set[str]:
    """Names of a module that are numbers written in it."""
    written = [node for node in tree.body if isinstance(node, ast.Assign) and _numbers(node.value)]
    targets = [target for node in written if not _names(node.value) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _names(value: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}


def _numbers(value: ast.expr) -> bool:
    """True for a number other than 0, and for an expression computed with one."""
    of = isinstance(value, ast.Constant | ast.BinOp | ast.UnaryOp)
    constants = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return of and any(type(constant) in (int, float) and constant for constant in constants)


def _own(value: ast.expr, constants: set[str]) -> bool:
    """True for an expression with a number of seconds of its own."""
    if "patience" in _names(value):
        return False
    return _numbers(value) or (isinstance(value, ast.Name | ast.BinOp) and bool(_names(value) & constants))


CLOCK = "time.monotonic()"


def _given(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Every place where a number of seconds to wait is given: as it is written, and its value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((ast.unparse(k), k.value) for k in node.keywords if k.arg in KEYWORDS)
            text = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Constant)
            name = "" if text else ast.unparse(node.func).rpartition(".")[2]
            yield from ((ast.unparse(node), node.args[i]) for i in POSITIONS.get(name, ()) if i < len(node.args))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = node.args
            named = where.posonlyargs + where.args
            defaults = [*zip(named[len(named) - len(where.defaults) :], where.defaults, strict=True)]
            defaults += [(a, d) for a, d in zip(where.kwonlyargs, where.kw_defaults, strict=True) if d is not None]
            yield from ((f"{a.arg}={ast.unparse(d)}", d) for a, d in defaults if a.arg in {*KEYWORDS, "seconds"})
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and ast.unparse(node.left) == CLOCK:
            yield ast.unparse(node), node.right
        elif (
            isinstance(node, ast.Compare)
            and CLOCK in ast.unparse(node.left)
            and isinstance(node.ops[0], ast.Lt | ast.LtE)
        ):
            yield ast.unparse(node), node.comparators[0]


def own_seconds(source: str) -> list[str]:
    """Waits of a module that have seconds of their own, as they are written."""
    tree = ast.parse(source)
    constants = _constants(tree)
    return [text for text, value in _given(tree) if _own(value, constants)]


def test_no_wait_has_seconds_of_its_own() -> None:
    found = {str(path.relative_to(ROOT)): own_seconds(path.read_text()) for path in sorted(ROOT.glob("tests/**/*.py"))}
    own = [f"{path}: {text}" for path, texts in found.items() for text in texts if text not in ALLOWED.get(path, {})]
    assert not own, f"take a kind of tests/support/patience.py, or give the reason in {Path(__file__).name}: {own}"
    gone = [f"{path}: {text}" for path, texts in ALLOWED.items() for text in texts if text not in found.get(path, [])]
    assert not gone, f"allowed, and no longer there: {gone}"


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(words, timeout=60)",
        "wait_until(ready, 60)",
        "await asyncio.wait_for(task, 2 * 30)",
        "server.wait_ready(READY)\nREADY = 180.0",
        "run.ends('CRASH', within_s=20 * len(nodes))",
        "def wait(condition, seconds=10): ...",
        "async def wait(*, deadline_s: float = 10): ...",
        "end = time.monotonic() + 30",
        "assert time.monotonic() - begin < 20",
    ],
)
def test_seconds_in_a_test_are_found(source: str) -> None:
    assert len(own_seconds(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(words, timeout=patience.PROCESS)",
        "wait_until(ready, patience.SLURM)",
        "run.ends('CRASH', within_s=SLURMD_TIMEOUT + patience.JOB)\nSLURMD_TIMEOUT = 300",
        "assert time.monotonic() - begin > 0.2",
        "'+'.join(['x'] * 450)",
        "time.sleep(600)",
        "end = time.monotonic() + seconds",
    ],
)
def test_what_is_no_wait_with_seconds_of_its_own_is_left_alone(source: str) -> None:
    assert own_seconds(source) == []


def test_a_quiet_machine_has_the_base_and_a_slow_or_busy_one_more_up_to_a_bound() -> None:
    quiet = patience.QUIET_S
    assert patience.scale_of(quiet, 0.0, 2) == patience.scale_of(quiet / 3, 0.0, 2) == 1
    assert patience.scale_of(3 * quiet, 0.0, 2) == 3
    assert patience.scale_of(quiet, 3.0, 2) == 2.5
    assert patience.scale_of(100 * quiet, 100.0, 2) == patience.MOST


@pytest.mark.parametrize("text", ["", "much", "0", "-1", "nan", "inf"])
def test_a_scale_that_is_no_positive_number_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadInput, match=patience.VARIABLE):
        patience.read_scale(text)


def test_the_processes_below_a_session_have_its_scale() -> None:
    code = "from tests.support import patience; print(patience.SCALE, patience.ENGINE)"

    def said(**environment: str) -> list[float]:
        words = [sys.executable, "-c", code]
        env = {**os.environ, **environment}
        done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=patience.PROCESS)
        assert done.returncode == 0, done.stderr
        return [float(word) for word in done.stdout.split()]

    assert said() == [patience.SCALE, patience.ENGINE]
    assert said(**{patience.VARIABLE: "20"}) == [20, pytest.approx(20 / patience.SCALE * patience.ENGINE)]
