"""Errors a person sees, and the exit code of each kind."""

from __future__ import annotations

import enum
import errno


class Cause(enum.IntEnum):
    """Why a run or a command ended; the value is the process's exit code."""

    SUCCESS = 0
    CODE_ERROR = 1
    BAD_INPUT = 2
    OUT_OF_MEMORY = 11
    NODE_FAILURE = 12
    TIME_LIMIT = 13
    PREEMPTED = 14
    CANCELLED = 15
    PREFLIGHT = 16
    DEADLINE = 17
    DATA_ERROR = 18
    STORAGE = 19
    CRASH = 20
    """A process of the run crashed or was killed, or a connection between ranks broke, on nodes without a fault."""
    SPIKE = 21
    """Training left its course in one rollout, which is undone."""

    @property
    def requeue_mends(self) -> bool:
        """Whether starting the same job again can help."""
        return self in (Cause.NODE_FAILURE, Cause.TIME_LIMIT, Cause.PREEMPTED, Cause.CRASH, Cause.SPIKE)

    @property
    def may_recur(self) -> bool:
        """Whether the same end may come again on good nodes: starts after it are bounded, and need progress."""
        return self is Cause.CRASH


STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO})
"""Errors of a disk that is full, read-only or gone."""


def is_storage_error(error: BaseException) -> bool:
    """Whether the shared file system or a disk is the cause, and no program."""
    return isinstance(error, OSError) and error.errno in STORAGE_ERRNOS


class VimeError(Exception):
    """An error with a cause that decides the exit code."""

    cause = Cause.CODE_ERROR


class BadInput(VimeError):
    """Unusable input. The text is one line: the thing, its value, what to do."""

    cause = Cause.BAD_INPUT


class SchedulerError(VimeError):
    """The scheduler is absent, did not answer in time, or a command of it failed."""


class DeadlineExceeded(VimeError):
    """A wait ended without what it waited for; the text says what was missing."""

    cause = Cause.DEADLINE


class Crash(VimeError):
    """A process of the run ended that should serve on, for a reason outside its program."""

    cause = Cause.CRASH


class DataError(VimeError):
    """A rollout or a data set cannot give what training needs (all groups filtered, rewards not finite)."""

    cause = Cause.DATA_ERROR
