"""The controller: runs the plan's stages in order, keeps the services up, and ends the run with its cause.

It runs once, on the batch host (or on this machine), owns every process it starts, and journals what happens.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from vime.errors import Cause, VimeError
from vime.launch import gate
from vime.launch.binding import bind
from vime.launch.events import Event, Journal
from vime.launch.failure import Failure, RunFailed, diagnose, ended_early, late
from vime.launch.rundir import CHECKPOINT_DONE, CHECKPOINT_REQUEST, log_folder, make_secrets, task_log
from vime.launch.signals import Signals
from vime.launch.steps import Place, Runner, Step
from vime.launch.supervise import start_ticks
from vime.planning.chain import Link, find_link, part
from vime.planning.io import BINDING, read_plan, write_binding
from vime.planning.types import Binding, Plan, Stage

POLL_S = 0.25
STOP_GRACE_S = 12.0
"""What a task has to end its command: its supervisor asks for six seconds and then kills."""
HURRIED_GRACE_S = 4.0
"""The same when Slurm is about to kill the job."""
ROOT_CAUSE_S = 2.0
"""How long a failed stage waits for the word of a service that died under it."""


class Controller:
    """One start of a run; a requeued job makes a new one."""

    def __init__(
        self,
        plan: Plan,
        runner: Runner,
        *,
        say: Callable[[str], None] = print,
        watching: Callable[[], None] = lambda: None,
        link: Link | None = None,
    ) -> None:
        """`say` gets a line an event, `watching` is called again and again while a stage runs.

        In a chain `plan` is that of the job's own part, and `link` tells which one it is.
        """
        self._plan, self._runner, self._link = plan, runner, link
        self._say, self._watching = say, watching
        self._run = Path(plan.run_dir)
        self._steps: list[Step] = []
        self._binding: Binding | None = None
        self._grace_s = STOP_GRACE_S
        self._signals = Signals()

    def run(self) -> Cause:
        """From the first stage to the end of the run. Called in the main thread."""
        with self._signals:
            prepare_folders(self._run)
            self._journal = Journal(self._run)
            failure = self._attempt()
            cause = self._finish(failure)
            self._journal.close()
        return cause

    def _attempt(self) -> Failure | None:
        data = {"job": self._runner.job, "restart": self._runner.restart, "host": socket.gethostname()}
        data |= {"pid": os.getpid(), "pid_start": start_ticks(os.getpid())}
        if self._link is not None:
            data |= {"link": self._link.name, "link_index": self._link.index}
        self._event("run-start", f"{self._plan.run_name}: start {self._runner.restart}", data=data)
        try:
            for stage in self._plan.stages:
                self._stage(stage)
        except RunFailed as error:
            return error.failure
        except VimeError as error:
            return Failure(error.cause, str(error))
        except Exception as error:  # noqa: BLE001 -- the run's last word must name whatever ended it
            traceback.print_exception(error)
            lines = traceback.format_exception(error)
            return Failure(
                Cause.CODE_ERROR, f"the controller failed: {type(error).__name__}: {error}", tail=tuple(lines)
            )
        finally:
            self._stop_all()
        return None

    def _finish(self, failure: Failure | None) -> Cause:
        if failure is None:
            if self._link is not None and self._link.before is not None:
                self._event("job-end", f"{self._link.name} is done, {self._link.before} follows")
            else:
                self._event("run-end", "the run succeeded", data={"cause": Cause.SUCCESS.name})
            return Cause.SUCCESS
        cause = failure.cause
        again = self._requeue(cause)
        self._event(
            "run-end",
            failure.text + (f"; requeued {again}" if again else ""),
            stage=failure.stage,
            node=failure.node,
            rank=failure.rank,
            data={"cause": cause.name, "log_tail": "\n".join(failure.tail), "requeued": bool(again)},
        )
        return cause

    def _requeue(self, cause: Cause) -> str:
        """Asks for another start where that can help; who does it, or nothing."""
        if not (cause.requeue_mends and self._runner.can_requeue):
            return ""
        if self._grace_s == HURRIED_GRACE_S:
            # Slurm ends this start itself, and starts the job again where it is going to.
            return "by Slurm" if cause in (Cause.PREEMPTED, Cause.NODE_FAILURE) else ""
        if self._runner.restart >= self._plan.max_timeouts:
            self._say(f"not requeued: {self._runner.restart} starts, at most {self._plan.max_timeouts}")
            return ""
        self._event("requeue", f"start {self._runner.restart + 1} follows: {cause.name.lower()}")
        self._runner.requeue()
        return "by vime"

    # -- stages --

    def _stage(self, stage: Stage) -> None:
        why = ""
        if gate.is_gated(stage):
            why = gate.difference(stage, self._plan.run_dir)
            if why is None:
                self._event("stage-skip", "its outputs are there and verified", stage=stage.name)
                return
            why = "; ".join([why, *gate.prepare(stage, self._plan.run_dir)])
        step = self._start(stage, why)
        self._watch(step)
        seconds = round(time.monotonic() - step.started, 3)
        if stage.service:
            self._event("stage-ready", f"ready after {seconds:.1f} s", stage=stage.name, data={"seconds": seconds})
            return
        if stage.name == "preflight":
            self._bind(step)
        if gate.is_gated(stage):
            gate.seal(stage, self._plan.run_dir)
        self._steps.remove(step)
        step.close()
        self._event("stage-end", f"done after {seconds:.1f} s", stage=stage.name, data={"seconds": seconds})

    def _start(self, stage: Stage, why: str) -> Step:
        places = self._places(stage)
        log_folder(self._run, stage.name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._link_current_log(stage, places)
        self._show(stage.name)
        self._event("stage-start", why, stage=stage.name, data={"nodes": [place.name for place in places]})
        step = self._runner.start(stage, places)
        self._steps.append(step)
        return step

    def _places(self, stage: Stage) -> tuple[Place, ...]:
        names = self._runner.nodes()
        if self._binding is None:
            # Preflight looks at every node of the allocation, spares too.
            return tuple(Place(i, name) for i, name in enumerate(names))
        bound = {node.index: names[node.slurm_index] for node in self._binding.nodes}
        return tuple(Place(node, bound[node]) for node in stage.nodes)

    def _watch(self, step: Step) -> None:
        """Until the stage has ended or the service is ready. Raises RunFailed for everything else."""
        stage, deadline = step.stage, time.monotonic() + step.stage.deadline_s
        while True:
            self._obey_signals(step)
            for report in step.pump():
                if report.kind == "ready" and stage.service and report.rank == 0:
                    return
            code = step.poll()
            self._check_services(besides=step)
            if code is not None:
                step.pump()
                if stage.service:
                    raise RunFailed(ended_early(step, code))
                if code:
                    raise RunFailed(self._root_cause(step, code))
                return
            if time.monotonic() > deadline:
                raise RunFailed(late(step, stage.deadline_s))
            self._watching()
            self._signals.wait([fd for step in self._steps for fd in step.descriptors()], POLL_S)

    def _check_services(self, besides: Step) -> None:
        for service in self._steps:
            if service is not besides:
                service.pump()
                code = service.poll()
                if code is not None:
                    service.pump()
                    raise RunFailed(ended_early(service, code))

    def _root_cause(self, step: Step, code: int) -> Failure:
        """The stage's own failure, or that of a service that died under it and is heard of a little later."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        while time.monotonic() < deadline and any(other is not step for other in self._steps):
            try:
                self._check_services(besides=step)
            except RunFailed as error:
                return error.failure
            self._signals.wait([], POLL_S)
        return diagnose(step, code)

    def _bind(self, step: Step) -> None:
        bound = bind(self._plan, self._runner, step, end_time=self._runner.end_time())
        self._event("preflight", bound.text, stage="preflight", data={"nodes": bound.table})
        self._binding = bound.binding
        write_binding(self._run, bound.binding)
        hosts = {str(node.index): node.host for node in bound.binding.nodes}
        self._event("binding", f"{len(hosts)} nodes, ports moved by {bound.binding.port_offset}", data={"hosts": hosts})

    # -- the end --

    def _obey_signals(self, step: Step) -> None:
        number = self._signals.take()
        if number is None:
            return
        self._event("signal", f"{number.name} while {step.stage.name} runs", stage=step.stage.name)
        if number is signal.SIGUSR2:
            self._obey_warning(step)
        self._grace_s = HURRIED_GRACE_S
        cause = Cause.CANCELLED if number is signal.SIGINT else self._runner.why_ended()
        text = f"{step.stage.name} was ended by {number.name}: {cause.name.lower().replace('_', ' ')}"
        raise RunFailed(Failure(cause, text, step.stage.name))

    def _obey_warning(self, step: Step) -> None:
        """The allocation ends soon, or shall be given up: save what training has, then start again."""
        cause = Cause.TIME_LIMIT if self._ends_soon() else Cause.PREEMPTED
        saved = self._ask_for_checkpoint(step) if step.stage.name == "train" else None
        text = f"{step.stage.name} was stopped before the {cause.name.lower().replace('_', ' ')}"
        text += f" with checkpoint {saved}" if saved else ""
        raise RunFailed(Failure(cause, text, step.stage.name))

    def _ends_soon(self) -> bool:
        end = self._binding.end_time if self._binding else self._runner.end_time()
        # Slurm sends the signal up to a minute early.
        return end is not None and end - time.time() < self._plan.signal_lead_s + 90

    def _ask_for_checkpoint(self, step: Step) -> str | None:
        """The checkpoint that training wrote on request; None when it did not in the time that is left."""
        control = self._run / "control"
        (control / CHECKPOINT_REQUEST).touch(mode=0o600)
        end = (self._binding.end_time if self._binding else None) or time.time() + self._plan.signal_lead_s
        # Stopping the stages after the checkpoint takes time too.
        left = max(0.0, end - time.time() - 2 * STOP_GRACE_S)
        self._event("checkpoint-request", f"{left:.0f} s for a checkpoint", stage="train", data={"seconds": left})
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            step.pump()
            if step.poll() is not None:
                break
            number = self._signals.take()
            if number not in (None, signal.SIGUSR2):
                self._grace_s = HURRIED_GRACE_S
                break
            self._signals.wait(step.descriptors(), POLL_S)
        answer = control / CHECKPOINT_DONE
        if not answer.exists():
            self._event("checkpoint", "none was written in time", stage="train")
            return None
        text = answer.read_text(encoding="utf-8")
        self._event("checkpoint", text, stage="train")
        return text

    def _stop_all(self) -> None:
        """Ends every step, the last one started first."""
        for step in reversed(self._steps):
            self._runner.stop(step, self._grace_s)
            self._event("stage-end", "stopped", stage=step.stage.name)
        self._steps.clear()

    # -- telling --

    def _event(self, kind: str, text: str = "", **fields: object) -> None:
        event = self._journal.write(kind, text, **fields)  # pyright: ignore[reportArgumentType]
        self._say(line_of(event))

    def _show(self, text: str) -> None:
        try:
            self._runner.show(f"vime: {text}")
        except VimeError as error:
            # Only what squeue shows is poorer.
            print(f"note: the job's comment was not set: {error}", file=sys.stderr)

    def _link_current_log(self, stage: Stage, places: tuple[Place, ...]) -> None:
        """`logs/current.log` is always the log of the running stage's first task."""
        target = task_log(self._run, stage.name, places[0].index, 0, stage.tasks_per_node)
        link = self._run / "logs" / "current.log"
        partial = link.with_name(f".current.{os.getpid()}")
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.relative_to(link.parent))
        os.replace(partial, link)


def prepare_folders(run: Path) -> None:
    """The run's folders and tokens, and nothing left of an earlier start that this one could take for its own."""
    for name in ("logs", "control"):
        (run / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (CHECKPOINT_REQUEST, CHECKPOINT_DONE):
        (run / "control" / name).unlink(missing_ok=True)
    (run / BINDING).unlink(missing_ok=True)
    make_secrets(run)


def line_of(event: Event) -> str:
    """An event as a line for a person."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    where = " ".join(part for part in (event.stage, event.node) if part)
    return f"{clock} {event.kind:12} {where}{': ' if where and event.text else ''}{event.text}"


def control(run_dir: str, runner_of: Callable[[Plan], Runner], *, link: str | None = None) -> Cause:
    """Runs the controller of a run folder, or of one link of a chain."""
    whole = read_plan(run_dir)
    own = find_link(whole, link)
    plan = part(whole, own)
    return Controller(plan, runner_of(plan), say=lambda line: print(line, flush=True), link=own).run()
