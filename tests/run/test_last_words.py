"""The line that says most, from tails as programs print them, and the causes that known texts stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.errors import Cause
from vime.run.last_words import MAX_CHARACTERS, cause_of_text, telling_line

CHAINED = """\
Traceback (most recent call last):
  File "a.py", line 1, in f
RuntimeError: no answer

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "a.py", line 3, in g
ConnectionError: Failed to connect to the cluster at 10.0.0.1:3307"""

DURING = """\
KeyError: 'x'
During handling of the above exception, another exception occurred:
Traceback (most recent call last):
  File "b.py", line 3, in g
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB"""

AFTER_A_LOG_LINE = """\
INFO no error so far
Traceback (most recent call last):
  File "b.py", line 3, in g
RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 7x2)"""

GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "loop.py", line 70, in _run
  |     async with self._actors(group) as first, asyncio.TaskGroup() as tasks:
  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "watch.py", line 7, in watch
    |     raise Odd("engine 1 is odd")
    | vime.train.Odd: engine 1 is odd
    +------------------------------------"""

ENGINE = """\
(EngineCore_DP0 pid=1234) ERROR 11-27 00:00:00 [core.py:700] ValueError: No available memory for the cache blocks.
(EngineCore_DP0 pid=1234) Exception: WorkerProc initialization failed. See stack trace for root cause.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "core_client.py", line 3, in wait
(APIServer pid=1)     raise RuntimeError(
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"""

ACTOR = """\
ray.exceptions.RayTaskError(ValueError): ray::RankActor.train() (pid=61, ip=10.77.0.2, actor_id=5c, repr=rank 1)
  File "worker.py", line 88, in train
ValueError: loss has 3 rows, want 4"""

NCCL = """\
[rank3]: Traceback (most recent call last):
[rank3]:   File "actor.py", line 12, in step
[rank3]:     dist.all_reduce(x)
[rank3]: torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error
[rank3]:[W1127 00:00:00 ProcessGroupNCCL.cpp:1496] Warning: destroy_process_group() was not called before program exit"""  # noqa: E501

ILLEGAL = """\
RuntimeError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""

SRUN = """\
error: training ended: crash: rank 1 died: its process was killed
srun: error: node02: task 0: Exited with exit code 20
srun: Terminating StepId=12.3"""

SEGFAULT = """\
Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "a.py", line 1 in f"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (CHAINED, "ConnectionError: Failed to connect to the cluster at 10.0.0.1:3307"),
        (DURING, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB"),
        (AFTER_A_LOG_LINE, "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 7x2)"),
        (GROUP, "vime.train.Odd: engine 1 is odd"),
        (ENGINE, "ValueError: No available memory for the cache blocks."),
        (ACTOR, "ValueError: loss has 3 rows, want 4"),
        (NCCL, "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error"),  # noqa: E501
        (ILLEGAL, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        (SRUN, "error: training ended: crash: rank 1 died: its process was killed"),
        (SEGFAULT, "Fatal Python error: Segmentation fault"),
        ("srun: error: node02: task 1: Killed", "srun: error: node02: task 1: Killed"),
        ("loading\ndone", "done"),
        ("", "no output"),
    ],
    ids=["chained", "during", "log", "group", "engine", "actor", "nccl", "illegal", "srun", "segfault", "only-srun", "calm", "empty"],  # noqa: E501
)  # fmt: skip
def test_the_line_that_says_why(text: str, line: str) -> None:
    assert telling_line(text.splitlines()) == line


@given(st.lists(st.text(max_size=80), max_size=12))
def test_any_tail_gives_one_line_that_is_part_of_it(tail: list[str]) -> None:
    line = telling_line(tail)
    assert len(line) <= MAX_CHARACTERS
    assert line == "no output" or any(line in given for given in tail)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", Cause.NODE_FAILURE),
        ("CUDA error: uncorrectable NVLink error detected during the execution", Cause.NODE_FAILURE),
        ("NVRM: Xid (PCI:0000:9d:00): 79, pid=4242, name=python, GPU has fallen off the bus.", Cause.NODE_FAILURE),
        ("Unable to determine the device handle for GPU0: 0000:9D:00.0: GPU is lost.", Cause.NODE_FAILURE),
        ("NVRM: Xid (PCI:0000:9d:00): 13, Graphics SM Warp Exception", None),
        ("NVRM: Xid (PCI:0000:9d:00): 31, pid=4242, MMU Fault", None),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB", Cause.OUT_OF_MEMORY),
        ("OSError: [Errno 28] No space left on device", Cause.STORAGE),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", Cause.CRASH),
        ("ncclSystemError: System call (e.g. socket, malloc) or external library call failed", Cause.CRASH),
        ("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=41)", Cause.CRASH),
        ("RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.2]:3021", Cause.CRASH),
        ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue", Cause.CRASH),
        ("RuntimeError: CUDA error: device-side assert triggered", None),
        ("ValueError: loss has 3 rows, want 4", None),
    ],
)
def test_the_cause_of_a_known_text(text: str, cause: Cause | None) -> None:
    assert cause_of_text(["one line before", text]) is cause


def test_a_fault_of_a_gpu_weighs_more_than_the_collective_that_it_broke() -> None:
    lines = ["CUDA error: uncorrectable ECC error encountered", "ncclRemoteError: remote process exited"]
    assert cause_of_text(lines) is cause_of_text(lines[::-1]) is Cause.NODE_FAILURE
