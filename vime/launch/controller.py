"""The controller: runs the plan's stages in order, keeps the services up, and ends the run with its cause.

It runs once, on the batch host (or on this machine), owns every process it starts, and journals what happens.

One module since stages, signals and the end share one loop's state: the running steps and the time left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from vime.errors import BadInput, Cause, VimeError, is_storage_error
from vime.launch import gate
from vime.launch.allocation import Allocation
from vime.launch.evaluations import Evaluations
from vime.launch.failure import Facts, Failure, RunFailed, decide, facts_of, hung, late, may_repeat
from vime.launch.hold import Hold, keeps
from vime.launch.lead import TimeLeft
from vime.launch.restarts import HURRIED_PATIENCE_S, Restarts, words
from vime.launch.signals import Signals
from vime.launch.steps import AllocatedNode, Runner, Step
from vime.launch.witness import witnessed
from vime.node.checks import broken_gpus
from vime.node.post_mortem import post_mortem_stage
from vime.node.ring import RING
from vime.node.sweep import SWEEP_S, sweep_stage
from vime.run.chain import PREFLIGHT, REHEARSAL, Link, find_link, part
from vime.run.control import checkpoint_answer, control_folder, request_checkpoint, withdraw_request
from vime.run.folder import BINDING, log_folder, read_plan, task_log
from vime.run.journal import Event, Journal
from vime.run.owner import Superseded, owned, require_owner, this_start
from vime.run.plan import Plan, Stage
from vime.run.tokens import make_tokens
from vime.system.files import replace_link
from vime.system.private import private_folder
from vime.system.processes import start_ticks

POLL_S = 0.25
COMMENT_CHARACTERS = 200
STOP_GRACE_S = 12.0
"""Time for a task to end its command: its supervisor sends KILL six seconds after TERM."""
HURRIED_GRACE_S = 4.0
"""The same, in seconds, when Slurm is about to kill the job."""
ROOT_CAUSE_S = 2.0
"""Wait for news that a service died and so caused a stage to fail."""
JOURNAL_PATIENCE_S = 30.0
"""Longest wait of the final event for a file system that refuses writes."""
STEP_PATIENCE_S = 60.0
LOOK_S = 20.0
"""Interval between two looks at the nodes of a service that is not ready."""
DRIVER_SILENCE_S = 600.0
"""Silence after which training's driver counts as hung. Long, since writing a rollout's samples blocks the driver."""
MAY_BE_A_GPU = (Cause.CRASH, Cause.CODE_ERROR, Cause.DEADLINE)
"""Causes that may hide a broken GPU; the nodes are then inspected."""
MOST_SAVE_S = 3600.0
"""Longest time for a requested save when the allocation continues, or has no end."""


class Controller:
    """One start of a run; a requeued job creates a new one."""

    def __init__(
        self,
        plan: Plan,
        runner: Runner,
        *,
        say: Callable[[str], None] = print,
        watching: Callable[[], None] = lambda: None,
        link: Link | None = None,
    ) -> None:
        """`say` receives one line per event; `watching` is called repeatedly while a stage runs.

        In a chain, `plan` covers this job's part only, and `link` names that part.
        """
        self._plan, self._runner, self._link = plan, runner, link
        self._say, self._watching = say, watching
        self._run = Path(plan.run_dir)
        self._steps: list[Step] = []
        self._allocation = Allocation(plan, runner, event=self._event, say=say)
        self._time = TimeLeft(plan, runner)
        self._signals = Signals()
        self._restarts = Restarts(plan, runner, self._allocation, self._signals, event=self._event, say=say)
        self._evaluations = Evaluations(plan, event=self._event)
        self._rehearsed = False
        """True once the rehearsal has passed: other nodes change nothing of what it tries."""

    def run(self) -> Cause:
        """Run all stages and return the run's cause. Called in the main thread."""
        with self._signals, contextlib.ExitStack() as held:
            try:
                me = this_start(self._runner.job, self._runner.restart)
                held.enter_context(owned(self._run, me, self._runner.runs))
                prepare_folders(self._run)
                self._journal = Journal(self._run)
            except (OSError, BadInput) as error:
                self._say(f"error: run folder {self._run} cannot be used: {error}")
                cause = Cause.STORAGE if is_storage_error(error) else Cause.BAD_INPUT
                self._show(f"{cause.name}: {error}")
                return cause
            self._restarts.tell_of_lost_start()
            try:
                while (failure := self._attempt()) is not None:
                    require_owner(self._run, self._runner.job, self._runner.restart)
                    if not self._restarts.recovers(failure, serving=bool(self._steps)):
                        break
                    if not self._restarts.kept:
                        self._stop_all()
            except Superseded as error:
                # The other start's journal and queue entry are not this one's to write.
                self._say(f"error: {error}")
                return Cause.CANCELLED
            finally:
                self._stop_all()
            self._evaluations.stop()
            cause = self._finish(failure)
            self._deliver(cause, failure)
            self._journal.close()
        return cause

    def _attempt(self) -> Failure | None:
        """Run the stages; the failure that ended them, None for none. Services may still run after a failure."""
        failure = self._run_stages()
        if failure is None or not (self._restarts.may_keep(failure) and self._ended_service() is None):
            self._stop_all()
        else:
            self._stop([step for step in self._steps if not step.stage.service])
        return failure

    def _run_stages(self) -> Failure | None:
        data = {"job": self._runner.job, "restart": self._runner.restart, "host": socket.gethostname()}
        data |= {"pid": os.getpid(), "pid_start": start_ticks(os.getpid())}
        data |= self._restarts.begin()
        if self._link is not None:
            data |= {"link": self._link.name, "link_index": self._link.index}
        self._event("run-start", f"{self._plan.run_name}: start {self._runner.restart}", data=data)
        try:
            if self._restarts.kept:
                withdraw_request(self._run)
            elif self._restarts.recovering:
                prepare_folders(self._run)
            for stage in self._plan.stages:
                if why := self._needless(stage):
                    self._event("stage-skip", why, stage=stage.name)
                    continue
                self._stage(stage)
                self._rehearsed = self._rehearsed or stage.name == REHEARSAL
        except RunFailed as error:
            return error.failure
        except VimeError as error:
            cause = Cause.STORAGE if error.__cause__ is not None and is_storage_error(error.__cause__) else error.cause
            return Failure(cause, str(error))
        except Exception as error:  # noqa: BLE001 -- the run's last word must name whatever ended it
            lines = traceback.format_exception(error)
            self._say("".join(lines))
            cause = Cause.STORAGE if is_storage_error(error) else Cause.CODE_ERROR
            text = f"the controller failed: {type(error).__name__}: {error}"
            return Failure(cause, text, node=socket.gethostname(), tail=tuple(lines))
        return None

    def _needless(self, stage: Stage) -> str:
        """Reason to skip a stage that an earlier attempt of this start has done; empty if it must run."""
        if stage.name == REHEARSAL and self._rehearsed:
            return "passed before in this start"
        if not self._restarts.kept:
            return ""
        if stage.name == RING:
            return "measured before in this start"
        if stage.name == PREFLIGHT or stage.service:
            return "" if self._allocation.renews(stage) else "no node is new"
        return ""

    def _finish(self, failure: Failure | None) -> Cause:
        if failure is None:
            if self._link is not None and self._link.before is not None:
                self._event("job-end", f"{self._link.name} is done, {self._link.before} follows")
            else:
                self._event("run-end", "the run succeeded", data={"cause": Cause.SUCCESS.name})
            return Cause.SUCCESS
        self._restarts.finish(failure)
        return failure.cause

    def _deliver(self, cause: Cause, failure: Failure | None) -> None:
        """Deliver the run's end to the queue and to the journal, which may have to wait for its file system."""
        self._show(cause.name if failure is None else f"{cause.name}: {failure.text}"[:COMMENT_CHARACTERS])
        deadline = time.monotonic() + (HURRIED_PATIENCE_S if self._restarts.hurried else JOURNAL_PATIENCE_S)
        while not self._journal.flush() and time.monotonic() < deadline:
            self._signals.wait([], 1.0)
        if self._journal.error is not None:
            self._say(f"error: the journal lacks the last events: {self._journal.error}")

    # -- stages --

    def _stage(self, stage: Stage) -> None:
        with contextlib.ExitStack() as held:
            # Reusing a verified artefact takes no lock: the user may lack write access to its folder.
            if gate.is_gated(stage) and gate.difference(stage, self._plan.run_dir) is not None:
                self._take_outputs(stage, lock := gate.OutputLock(stage))
                held.callback(lock.release)
            self._make(stage)

    def _take_outputs(self, stage: Stage, lock: gate.OutputLock) -> None:
        """Wait while another run makes the same outputs. Raises RunFailed at the stage's deadline or on a signal."""
        deadline, told = time.monotonic() + stage.deadline_s, False
        while not lock.take():
            if not told:
                self._say(f"{stage.name} waits: another run makes {stage.outputs[0].path}")
                self._show(f"{stage.name} waits for another run")
                told = True
            if (number := self._signals.take()) is not None:
                raise self._interrupted(stage, number, "it waited")
            if time.monotonic() > deadline:
                text = f"{stage.name} waited {stage.deadline_s:.0f} s for another run to make {stage.outputs[0].path}"
                raise RunFailed(Failure(Cause.DEADLINE, text, stage.name))
            self._signals.wait([], POLL_S)

    def _make(self, stage: Stage) -> None:
        why = ""
        if gate.is_gated(stage):
            why = gate.difference(stage, self._plan.run_dir)
            if why is None:
                self._event("stage-skip", "its outputs are there and verified", stage=stage.name)
                return
            why = "; ".join([why, *gate.prepare(stage, self._plan.run_dir)])
        if not stage.needs_services:
            self._stop_all()
        step = self._run_step(stage, why)
        seconds = round(time.monotonic() - step.started, 3)
        if stage.service:
            self._event("stage-ready", f"ready after {seconds:.1f} s", stage=stage.name, data={"seconds": seconds})
            return
        self._allocation.learn(step)
        if gate.is_gated(stage):
            gate.seal(stage, self._plan.run_dir)
        self._steps.remove(step)
        step.close()
        self._event("stage-end", f"done after {seconds:.1f} s", stage=stage.name, data={"seconds": seconds})
        self._settle_evaluations(step)

    def _settle_evaluations(self, step: Step) -> None:
        """Submit what training asked for last; on one machine, wait for the evaluations themselves."""
        self._evaluations.look(step)
        while not self._evaluations.settled:
            if (number := self._signals.take()) is not None:
                raise self._interrupted(step.stage, number, "its evaluations were submitted")
            self._signals.wait([], POLL_S)
            self._evaluations.look(step)

    def _interrupted(self, stage: Stage, number: signal.Signals, doing: str) -> RunFailed:
        """The run's failure on a signal while no process of the stage runs."""
        self._restarts.hurried = number is not signal.SIGUSR2
        cause = Cause.TIME_LIMIT if number is signal.SIGUSR2 else self._runner.why_ended()
        cause = Cause.CANCELLED if number is signal.SIGINT else cause
        return RunFailed(Failure(cause, f"{stage.name} was ended by {number.name} as {doing}", stage.name))

    def _run_step(self, stage: Stage, why: str) -> Step:
        """Return the step once it has ended well, or serves. Retried for STEP_PATIENCE_S if it may be."""
        deadline = time.monotonic() + STEP_PATIENCE_S
        while True:
            step = self._start(stage, why)
            try:
                self._watch(step)
                return step
            except RunFailed as error:
                if self._restarts.hurried or not may_repeat(step) or time.monotonic() > deadline:
                    raise
                why = f"again: {error.failure.text}"
            self._steps.remove(step)
            step.close()
            self._signals.wait([], 2.0)

    def _start(self, stage: Stage, why: str) -> Step:
        places = self._allocation.places(stage)
        self._allocation.prepare(stage)
        private_folder(log_folder(self._run, stage.name))
        self._link_current_log(stage, places)
        self._show(stage.name)
        self._event("stage-start", why, stage=stage.name, data={"nodes": [place.name for place in places]})
        step = self._runner.start(stage, places)
        self._steps.append(step)
        self._restarts.started(stage)
        return step

    def _watch(self, step: Step) -> None:
        """Wait until the stage has ended or the service is ready. Raises RunFailed on any other outcome."""
        stage, deadline = step.stage, time.monotonic() + step.stage.deadline_s
        look = time.monotonic() + LOOK_S
        while True:
            self._obey_signals(step)
            for report in step.pump():
                if report.kind == "ready" and stage.service and report.rank == 0:
                    return
            self._evaluations.look(step)
            code = step.poll()
            if (service := self._ended_service(besides=step)) is not None:
                raise RunFailed(self._judge(step, service=self._judged_alone(service)))
            if code is not None:
                step.pump()
                if code or stage.service or (stage.tells_end and not step.of_kind("result")):
                    raise RunFailed(self._judge(step, code))
                return
            if time.monotonic() > deadline:
                if (more := self._more_time(stage)) <= 0:
                    raise RunFailed(self._judge(step, late=late(step, stage.deadline_s)))
                deadline = time.monotonic() + more
            if stage.service and time.monotonic() > look:
                # srun goes on without a node of a service, so nothing else tells that one is lost as it starts.
                if set(self._allocation.lost_nodes()) & {place.name for place in step.places}:
                    raise RunFailed(self._judge(step))
                look = time.monotonic() + LOOK_S
            if (silent := step.silent_s) is not None and silent > DRIVER_SILENCE_S:
                raise RunFailed(self._judge(step, late=hung(step, silent)))
            self._watching()
            self._signals.wait([fd for step in self._steps for fd in step.descriptors()], POLL_S)

    def _more_time(self, stage: Stage) -> float:
        """Seconds until the allocation ends, for a stage that may use all of it; 0 for any other.

        The job may have more time than planned, granted by hand through sbatch or scontrol.
        """
        if stage.deadline_s < self._plan.cluster.time_limit_minutes * 60:
            return 0.0
        end = self._runner.end_time()
        return 0.0 if end is None else end - time.time()

    def _ended_service(self, besides: Step | None = None) -> Step | None:
        """First service that has ended while needed; None while all run."""
        for service in self._steps:
            if service is not besides and service.stage.service:
                service.pump()
                # A service tells of its failure before it cleans up, which may outlast the stage that fails with it.
                ended = service.poll() is not None or bool(service.of_kind("failure"))
                service.pump()
                # srun ends a step once a task fails, but after a task that exits with 0 it waits for the others.
                if ended or service.ended_quietly:
                    return service
        return None

    def _judge(
        self, step: Step, code: int = 0, *, service: Failure | None = None, late: Failure | None = None
    ) -> Failure:
        """Failure of a stage, decided from reports of the nodes, the services and its own tasks."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        while service is None and late is None and self._others(step) and time.monotonic() < deadline:
            # The death of a service is noticed a little later than the failure it causes.
            if (ended := self._ended_service(besides=step)) is not None:
                service = self._judged_alone(ended)
            self._signals.wait([], POLL_S)
        if service is None and late is None:
            facts = facts_of(step, code, self._allocation.node_names())
        else:
            facts = Facts(step.stage.name, service=service, late=late, said=tuple(step.told()))
        facts = replace(facts, service=service, lost=self._allocation.lost_nodes())
        failure = decide(facts)
        if self._plan.on_gpu and step.stage.saves_on_request and failure.cause in MAY_BE_A_GPU:
            return decide(replace(facts, faulty=self._faulty_nodes()))
        return failure

    def _judged_alone(self, service: Step) -> Failure:
        return decide(facts_of(service, service.poll() or 0, self._allocation.node_names()))

    def _faulty_nodes(self) -> dict[str, str]:
        """Faults by node name, for nodes with broken GPUs. A node that does not report in time is left out."""
        stage = post_mortem_stage(self._plan)
        self._event("stage-start", "are GPUs broken?", stage=stage.name)
        step = self._runner.start(stage, self._allocation.places(stage))
        ended = step.wait(stage.deadline_s)
        self._runner.stop(step, HURRIED_GRACE_S)
        told = {step.name_of(report.rank): report.data for report in step.of_kind("result")}
        found = {node: broken_gpus(self._plan, data["gpus"], data["visible_gpus"]) for node, data in told.items()}
        broken = {node: faults for node, faults in found.items() if faults}
        silent = "" if ended else f"; not in time: {', '.join(p.name for p in step.places if p.name not in told)}"
        text = "; ".join(f"{node}: {', '.join(faults)}" for node, faults in broken.items()) or "none is"
        self._event("stage-end", text + silent, stage=stage.name)
        return {node: f"has a broken GPU: {', '.join(faults)}" for node, faults in broken.items()}

    def _others(self, step: Step) -> bool:
        return any(other is not step for other in self._steps)

    # -- the end --

    def _obey_signals(self, step: Step) -> None:
        number = self._signals.take()
        if number is None:
            if step.stage.saves_on_request and self._time.is_due():
                self._stop_in_time(step, Cause.TIME_LIMIT)
            return
        self._event("signal", f"{number.name} while {step.stage.name} runs", stage=step.stage.name)
        if number is signal.SIGUSR2:
            self._obey_warning(step)
            return
        self._restarts.hurried = True
        cause = Cause.CANCELLED if number is signal.SIGINT else self._runner.why_ended()
        lost = next(iter(self._allocation.lost_nodes()), None) if cause is Cause.NODE_FAILURE else None
        text = f"{step.stage.name} was ended by {number.name}: {words(cause)}" + (f" of {lost}" if lost else "")
        raise RunFailed(Failure(cause, text, step.stage.name, lost))

    def _obey_warning(self, step: Step) -> None:
        """Handle Slurm's warning: preemption, or the end of the time limit, which may still leave time to train."""
        if not self._time.ends_soon():
            self._stop_in_time(step, Cause.PREEMPTED)
        if not step.stage.saves_on_request or self._time.is_due():
            self._stop_in_time(step, Cause.TIME_LIMIT)

    def _stop_in_time(self, step: Step, cause: Cause) -> NoReturn:
        """Save a checkpoint if the stage can, and raise RunFailed; the run then starts again."""
        saved = self._ask_for_checkpoint(step) if step.stage.saves_on_request else None
        text = f"{step.stage.name} was stopped before the {words(cause)}"
        text += f" with checkpoint {saved}" if saved else ""
        raise RunFailed(Failure(cause, text, step.stage.name))

    def _ask_for_checkpoint(self, step: Step) -> str | None:
        """Request a checkpoint from training; None if it is not written in the time left."""
        request_checkpoint(self._run)
        self._time.look()
        # Stopping the stages after the checkpoint takes time too.
        left = max(0.0, min(self._time.left_s, MOST_SAVE_S) - 2 * STOP_GRACE_S)
        stage = step.stage.name
        self._event("checkpoint-request", f"{left:.0f} s for a checkpoint", stage=stage, data={"seconds": left})
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            step.pump()
            if step.poll() is not None:
                break
            number = self._signals.take()
            if number not in (None, signal.SIGUSR2):
                self._restarts.hurried = True
                break
            self._signals.wait(step.descriptors(), POLL_S)
        text = checkpoint_answer(self._run)
        if text is None:
            self._event("checkpoint", "none was written in time", stage=stage)
            return None
        self._event("checkpoint", text, stage=stage)
        return text

    def _stop_all(self) -> None:
        self._stop(self._steps)

    def _stop(self, steps: Sequence[Step]) -> None:
        """Stop these steps, the newest first."""
        for step in reversed(steps):
            self._runner.stop(step, HURRIED_GRACE_S if self._restarts.hurried else STOP_GRACE_S)
            self._event("stage-end", "stopped", stage=step.stage.name)
        silent = {place for step in steps for place in step.silent_places}
        self._steps = [step for step in self._steps if step not in steps]
        if silent and not self._restarts.hurried and self._runner.can_requeue:
            lost = self._runner.lost_nodes()
            self._sweep(tuple(sorted((at for at in silent if at.name not in lost), key=lambda place: place.index)))

    def _sweep(self, places: tuple[AllocatedNode, ...]) -> None:
        """Clear nodes whose supervisors were killed: the last task of a job to end on a node cleans up there."""
        if not places:
            return
        stage = sweep_stage(tuple(place.index for place in places))
        nodes = ", ".join(place.name for place in places)
        try:
            step = self._runner.start(stage, places)
        except OSError as error:
            # Not fatal: the run's own cause must still be reported.
            self._say(f"error: {nodes} could not be cleared: {error}")
            return
        if not step.wait(SWEEP_S):
            self._say(f"error: {nodes} could not be cleared within {SWEEP_S:.0f} s")
        self._runner.stop(step, HURRIED_GRACE_S)

    # -- output --

    def _event(self, kind: str, text: str = "", **fields: object) -> None:
        event = self._journal.write(kind, text, **fields)  # pyright: ignore[reportArgumentType]
        self._say(line_of(event))

    def _show(self, text: str) -> None:
        try:
            self._runner.show(f"vime: {text}")
        except VimeError as error:
            # Not fatal: only squeue's output suffers.
            self._say(f"note: the job's comment was not set: {error}")

    def _link_current_log(self, stage: Stage, places: tuple[AllocatedNode, ...]) -> None:
        """Point `logs/current.log` to the log of the running stage's first task."""
        target = task_log(self._run, stage.name, places[0].index, 0, stage.tasks_per_node)
        link = self._run / "logs" / "current.log"
        replace_link(link, target.relative_to(link.parent))


def prepare_folders(run: Path) -> None:
    """Make folders and tokens, and remove files of an earlier start that this one could take for its own."""
    for folder in (run / "logs", control_folder(run)):
        private_folder(folder)
    withdraw_request(run)
    (run / BINDING).unlink(missing_ok=True)
    make_tokens(run)


def line_of(event: Event) -> str:
    """One-line text of an event, for people."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    where = " ".join(part for part in (event.stage, event.node) if part)
    return f"{clock} {event.kind:12} {where}{': ' if where and event.text else ''}{event.text}"


def control(run_dir: str, runner_of: Callable[[Plan], Runner], *, link: str | None = None) -> Cause:
    """Run the controller of a run folder, or of one link of a chain."""
    with witnessed(run_dir):
        whole = read_plan(run_dir)
        own = find_link(whole, link)
        plan = part(whole, own)
        runner = runner_of(plan)
        cause = Controller(plan, runner, say=tell, link=own).run()
    if keeps(plan, cause):
        Hold(plan, end_time=runner.end_time, say=tell).keep()
    return cause


def tell(line: str) -> None:
    """Print a line to the job's output. Errors are ignored: the disk may be full, and the journal is authoritative."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
