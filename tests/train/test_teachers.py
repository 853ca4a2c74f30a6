"""Engines of the teacher that end are restarted, not for ever, and those that run are left alone."""

from __future__ import annotations

import pytest

from tests.support import patience
from tests.support.plans import plan_of
from vime.errors import Cause, Crash
from vime.rollout.client import EngineUnreachable
from vime.rollout.teacher import TeacherFailed
from vime.train.teachers import TeacherKeeper

GONE = EngineUnreachable("connection refused")


class Servers:
    """A fake of the server processes: those of `ended` ended; a restart fails `failures` times."""

    def __init__(self, ended: dict[int, str], failures: int = 0) -> None:
        self.ended, self.failures, self.restarts = ended, failures, 0

    async def exited(self) -> list[tuple[int, str]]:
        return list(self.ended.items())

    async def restart(self, engines, *, deadline_s: float) -> None:
        self.restarts += 1
        if self.restarts <= self.failures:
            raise Crash("it exited with 1 before it was ready")
        for engine in engines:
            del self.ended[engine]


def keeper_of(servers: Servers, *flags: str) -> TeacherKeeper:
    plan = plan_of("tiny-qwen3", "--use-opd", "--opd-teacher", "/t", "--opd-teacher-num-gpus", "2", *flags, nodes=1)
    return TeacherKeeper(plan, servers, deadline_s=patience.MOMENT, say=lambda _: None)


async def test_an_engine_that_runs_is_left_alone():
    servers = Servers({1: "exited with 9"})
    assert await keeper_of(servers).recover(0, GONE) is False
    assert servers.restarts == 0


async def test_an_engine_that_ended_is_restarted_once_for_all_that_wait_for_it():
    servers = Servers({1: "exited with 9"}, failures=1)
    keeper = keeper_of(servers)
    assert await keeper.recover(1, GONE) is True
    assert await keeper.recover(1, GONE) is False
    assert (servers.restarts, servers.ended) == (2, {})


async def test_after_the_limit_the_cause_names_teacher_engine_and_log():
    servers = Servers({0: "exited with 9"}, failures=9)
    with pytest.raises(
        TeacherFailed, match=r"engine 1 of the teacher /t failed 3 times.*-restarts is 2.*engine-1-"
    ) as e:
        await keeper_of(servers, "--max-engine-restarts", "2").recover(0, GONE)
    assert e.value.cause is Cause.CRASH
    assert servers.restarts == 2
