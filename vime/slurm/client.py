"""Calls of Slurm's client programs: a cleaned environment, a deadline, and words of theirs that are not lost.

Variables in a person's shell (`SINFO_*`, `SLURM_TIME_FORMAT`, `SBATCH_TIMELIMIT`, those of another allocation) change
what the programs print and even what a job gets; no call of vime sees them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Collection, Iterator, Mapping

from vime.errors import SchedulerError

CALL_SECONDS = 30.0
TIME_FORMAT = "SLURM_TIME_FORMAT"
_OPTIONS_OF = ("SLURM_", "SRUN_", "SALLOC_", "SBATCH_", "SINFO_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
_CONNECTION = ("SLURM_CONF", "SLURM_JWT", "SLURM_SACK", "SLURM_CLUSTER_NAME")
"""Beginnings of the variables that say where Slurm's controller is and how to authenticate."""
_OF_THE_JOB = ("SLURM_JOB_", "SLURM_RESTART_COUNT")
_OF_THE_JOB_EXACT = ("SLURM_JOBID", "SLURM_NODELIST", "SLURM_NNODES")
_LEFT_TO_THE_PERSON = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_QOS": "qos",
    "SBATCH_WCKEY": "wckey",
}
"""Variables of sbatch that stay, and the option that takes their place where a script states it."""
_MOST_CHARACTERS = 1500


class SlurmError(SchedulerError):
    """A Slurm command failed or did not answer."""


def client_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a client program: without its options, and without those of an allocation around it."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_OPTIONS_OF) or name.startswith(_CONNECTION)
    }


def sbatch_environment(environ: Mapping[str, str], stated: Collection[str] = ()) -> dict[str, str]:
    """The environment of sbatch, whose variables beat the lines of a script.

    Account, reservation, QOS and wckey of the person stay, except those that the script states (`stated`: names of
    its options, as `account`).
    """
    kept = {
        name: environ[name] for name, option in _LEFT_TO_THE_PERSON.items() if name in environ and option not in stated
    }
    return client_environment(environ) | kept


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of srun inside a job: without the job's defaults for options that every step states itself."""
    return client_environment(environ) | {
        name: value for name, value in environ.items() if name.startswith(_OF_THE_JOB) or name in _OF_THE_JOB_EXACT
    }


def call(*argv: str, seconds: float = CALL_SECONDS) -> str:
    """Output of a client program, times in it as Unix seconds. Raises SlurmError with its words."""
    env = {**client_environment(os.environ), TIME_FORMAT: "%s"}
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, env=env, errors="replace"
        )
    except FileNotFoundError as error:
        raise SlurmError(f"there is no {argv[0]} on this machine: run it where Slurm is installed") from error
    except OSError as error:
        raise SlurmError(f"cannot run {argv[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(argv)} did not answer within {seconds:.0f} s") from error
    if done.returncode:
        raise SlurmError(f"{' '.join(argv)} exited with {done.returncode}: {words_of(done.stderr or done.stdout)}")
    return done.stdout


@contextlib.contextmanager
def running(*argv: str) -> Iterator[None]:
    """Run a client program for the length of the block, at the end of which it is killed if it still runs; its answer
    does not matter. Raises SlurmError where it is missing."""
    env = client_environment(os.environ)
    try:
        started = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
        )
    except OSError as error:
        raise SlurmError(f"cannot run {argv[0]}: {error.strerror}") from error
    try:
        yield
    finally:
        started.kill()
        started.wait()


def words_of(text: str) -> str:
    """Everything that a program said, on one line: a filter of the site gives its reason first, Slurm its own last."""
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line and not line.endswith(": error:")]
    joined = "; ".join(dict.fromkeys(said)) or "no message"
    return joined if len(joined) <= _MOST_CHARACTERS else f"{joined[:_MOST_CHARACTERS]}…"
