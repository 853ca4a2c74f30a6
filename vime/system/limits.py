"""Limits of this process that a login shell may have brought along."""

from __future__ import annotations

import resource

MOST_FILES = 2**20
"""Open files that are asked for where the hard limit is higher: some programs walk through all that there may be."""
_RAISED = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_NPROC)


def raise_soft_limits() -> None:
    """Raise this process's soft limits of open files, locked memory and processes to the hard ones.

    Slurm hands on the soft limits of the shell that submitted, often 1024 open files.
    """
    for kind in _RAISED:
        soft, hard = resource.getrlimit(kind)
        wanted = hard
        if kind == resource.RLIMIT_NOFILE and (hard == resource.RLIM_INFINITY or hard > MOST_FILES):
            wanted = MOST_FILES
        if soft != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > soft):
            resource.setrlimit(kind, (wanted, hard))


def soft_limit(kind: int) -> int | None:
    """A soft limit; None where there is none."""
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft
