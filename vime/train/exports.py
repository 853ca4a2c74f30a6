"""HF folders written from checkpoints beside training: those of `--save-hf`, and the weights for `--eval-job`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from vime.errors import DeadlineExceeded, VimeError
from vime.planning.subject import WEIGHTS, export_folder
from vime.recipe.schema import Recipe
from vime.run.checkpoints import folder_of, held, hold, let_go
from vime.run.evaluations import evaluation_folder
from vime.run.folder import PLAN, log_folder
from vime.run.messages import report
from vime.run.plan import Plan
from vime.system.private import private_folder

POLL_SECONDS = 1.0
NICE = 10
"""Niceness of the exporting process, which shares the node's cores with rank 0."""
MOST_WAITING = 2
"""Exports under way and waiting from which one for an evaluation alone is left out: the file system is too slow."""


class ExportFailed(VimeError):
    """A checkpoint could not be written as an HF folder."""


@dataclass(frozen=True)
class Export:
    """One checkpoint to write as an HF folder."""

    rollout_id: int
    path: Path
    quantised: bool = False
    evaluates: bool = False
    """A job evaluates the folder."""
    own: bool = False
    """The folder is for that job alone."""


def export_after(plan: Plan, rollout_id: int, saves: int = 0) -> Export | None:
    """Target of the export after a rollout; None if nothing needs it as an HF folder.

    `saves`: checkpoints of this start so far, which count where `--save-interval` is `auto`.
    """
    recipe = plan.recipe
    evaluates = evaluates_checkpoint(recipe, rollout_id, saves)
    if (path := export_folder(recipe, rollout_id)) is not None:
        return Export(rollout_id, Path(path), evaluates=evaluates)
    if not evaluates:
        return None
    # Engines on processors cannot load block fp8.
    quantised = plan.on_gpu and "quantization_config" in plan.model_config_hf
    return Export(rollout_id, evaluation_folder(plan.run_dir, rollout_id) / WEIGHTS, quantised, True, own=True)


def evaluates_checkpoint(recipe: Recipe, rollout_id: int, saves: int = 0) -> bool:
    """True if `--eval-job` evaluates the checkpoint after this rollout: every Nth one, and the last."""
    if not recipe.eval.eval_job:
        return False
    interval = recipe.checkpoint.save_interval or recipe.rollout.num_rollout
    number = saves if isinstance(interval, str) else (rollout_id + 1) // interval
    return rollout_id == recipe.rollout.num_rollout - 1 or number % recipe.eval.eval_job_interval == 0


class Exports:
    """Exports of one start of a run, one at a time, each by a process that reads the checkpoint from disk."""

    def __init__(self, plan: Plan, *, deadline_s: float) -> None:
        self._plan, self._deadline_s = plan, deadline_s
        self._root = Path(plan.recipe.checkpoint.save or "")
        self._waiting: deque[Export] = deque()
        self._idle, self._new = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._failed: dict[int, str] = {}
        self._saves = 0
        for number in held(self._root):
            # Of a start that ended before its export.
            let_go(self._root, number)

    def resume(self, rollout_id: int) -> None:
        """Queue the export of the checkpoint that a start goes on from, if an earlier start did not end it."""
        found = export_after(self._plan, rollout_id)
        if found is None or not folder_of(self._root, rollout_id).is_dir():
            return
        if not (found.path / "config.json").exists() and not (found.own and (found.path.parent / PLAN).exists()):
            self._add(found)

    def saved(self, rollout_id: int) -> None:
        """Queue the export of a checkpoint that is published, or is being written."""
        self._saves += 1
        found = export_after(self._plan, rollout_id, self._saves)
        if found is None:
            return
        if found.own and len(self._waiting) >= MOST_WAITING:
            self._say_left_out(found, f"{len(self._waiting)} exports before it are not done")
            return
        self._add(found)

    async def run(self) -> None:
        """Write what is queued, until cancelled."""
        while True:
            while self._waiting:
                # It stays in the queue while it is under way.
                await self._one(self._waiting[0])
                self._waiting.popleft()
            self._idle.set()
            self._new.clear()
            await self._new.wait()

    async def finish(self) -> None:
        """Wait until every export has ended. Raises ExportFailed if one of `--save-hf` failed."""
        await self._idle.wait()
        if self._failed:
            which = ", ".join(map(str, self._failed))
            raise ExportFailed(
                f"--save-hf: no HF folder was written for rollout {which}: {next(iter(self._failed.values()))}; the "
                "run is trained and its checkpoints are whole: tools/convert_torch_dist_to_hf.py writes one by hand"
            )

    def _add(self, export: Export) -> None:
        try:
            hold(self._root, export.rollout_id)
        except OSError as error:
            self._fail(export, f"{error.filename}: {error.strerror}")
            return
        self._waiting.append(export)
        self._idle.clear()
        self._new.set()

    async def _one(self, export: Export) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                while not folder_of(self._root, export.rollout_id).is_dir():  # noqa: ASYNC110 -- a file appears
                    await asyncio.sleep(POLL_SECONDS)
                await self._write(export)
        except TimeoutError:
            self._fail(export, str(DeadlineExceeded(f"the export took more than {self._deadline_s:.0f} s")))
        except (OSError, VimeError) as error:
            self._fail(export, str(error))
        else:
            print(f"rollout {export.rollout_id}: HF folder {export.path}", flush=True)
            if export.evaluates:
                report("evaluate", rollout_id=export.rollout_id, weights=str(export.path))
        finally:
            with contextlib.suppress(OSError):
                let_go(self._root, export.rollout_id)

    async def _write(self, export: Export) -> None:
        if export.own:
            private_folder(export.path.parent.parent)
            private_folder(export.path.parent)
            # Of a branch that the run was set back from.
            await asyncio.to_thread(shutil.rmtree, export.path, ignore_errors=True)
        log = private_folder(log_folder(self._plan.run_dir, "export")) / f"{export.rollout_id:07d}.log"
        words = ["-m", "vime.checkpoint.export", "--load", str(folder_of(self._root, export.rollout_id))]
        words += ["--hf-checkpoint", self._plan.recipe.checkpoint.hf_checkpoint or "", "--save", str(export.path)]
        words += ["--quantise"] if export.quantised else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *words, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file, env=env
            )
        finally:
            os.close(file)
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ExportFailed(f"{lines[-1] if lines else f'exit code {code}'} ({log})")

    def _fail(self, export: Export, why: str) -> None:
        if not export.own:
            self._failed[export.rollout_id] = why
            print(f"error: rollout {export.rollout_id}: no HF folder was written: {why}", flush=True)
        if export.evaluates:
            self._say_left_out(export, why)

    def _say_left_out(self, export: Export, why: str) -> None:
        print(f"eval {export.rollout_id} is left out: {why}", flush=True)
        report("evaluate", rollout_id=export.rollout_id, left_out=why)
