"""On-policy distillation in small: a student learns from a teacher of another size; every part of the run is real."""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.support import patience, tiny_hf
from tests.support.reference_log_probs import reference_log_probs
from tests.support.small_base import start_run, tool, write_qwen3
from vime.observe.samples import read_rollout
from vime.run.folder import read_plan
from vime.run.metrics import read_metrics, series

pytestmark = pytest.mark.e2e

FLAGS = ("--num-rollout", "40", "--rollout-batch-size", "32", "--over-sampling-batch-size", "36")
FLAGS += ("--n-samples-per-prompt", "8", "--num-steps-per-rollout", "4", "--dynamic-sampling-filter-path", "none")
FLAGS += ("--conversion", "direct", "--eval-interval", "none", "--eval-prompt-data", "[]", "--no-use-kl-loss")
FLAGS += ("--use-opd", "--advantage-estimator", "on_policy_distillation", "--rm-type", "none", "--lr", "4e-3")


def write_teacher(folder: Path) -> None:
    """A model of two layers that is surer of its tokens than the student of three."""
    config = {**tool().CONFIGS["qwen3"], "num_hidden_layers": 2}
    tensors = tiny_hf.random_tensors(config, seed=7)
    surer = {name: value * 0.6 if value.dim() == 2 else value for name, value in tensors.items()}
    tool().save_tokenizer(tiny_hf.write_folder(folder, config, surer))


def servers_of(folder: Path) -> list[int]:
    """Processes that serve a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"vime.rollout.serve" in words and str(folder).encode() in words:
            found.append(int(path.parent.name))
    return found


def test_a_student_comes_closer_to_its_teacher_although_the_teachers_engine_is_killed(tmp_path: Path) -> None:
    write_qwen3(tmp_path)
    teacher = tmp_path / "teacher"
    write_teacher(teacher)
    log = tmp_path / "run.log"
    process = start_run(tmp_path, "opd", *FLAGS, "--opd-teacher", str(teacher), log=log)
    run, killed = tmp_path / "runs" / "opd", False
    end = time.monotonic() + patience.LEARNING
    while process.poll() is None and time.monotonic() < end:
        if not killed and (run / "metrics.jsonl").exists() and 1 in read_metrics(run):
            for pid in servers_of(teacher):
                os.kill(pid, signal.SIGKILL)
                killed = True
        time.sleep(0.5)
    said = log.read_text() + "".join(path.read_text() for path in (run / "logs").rglob("*.log"))
    assert process.poll() == 0, said[-6000:]

    distances = [value for _, value in series(read_metrics(run), "train/opd_reverse_kl")]
    assert len(distances) == 40
    assert statistics.fmean(distances[-5:]) < 0.75 * statistics.fmean(distances[:3]), distances
    assert killed
    assert "engine 1 of the teacher" in said
    assert "restarting it, 1 of 3 times" in said
    plan = read_plan(run)
    assert plan.teacher is not None
    assert [engine.gpus for engine in plan.servers] == [((0,),), ((1,),)]

    # The scores are the teacher's: those of its own forward pass over prompt and response, in another library.
    samples = read_rollout(run / "rollouts", 0).samples
    wanted = reference_log_probs(teacher, [(sample.prompt_ids, sample.response_ids, 1.0) for sample in samples])
    pairs = [pair for s, w in zip(samples, wanted, strict=True) for pair in zip(s.teacher_log_probs, w, strict=True)]
    differences = [abs(mine - theirs) for mine, theirs in pairs]
    assert sum(differences) / len(differences) < 0.03, differences
    assert {sample.reward for sample in samples} == {0.0}
