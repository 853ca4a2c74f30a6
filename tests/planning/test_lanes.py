"""Lanes of a sweep: whatever ends, is cancelled or is submitted in between, no more than K jobs run together."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vime.planning.lanes import turn

STEPS = st.lists(st.sampled_from(["submit", "submit", "submit", "end", "cancel", "forget"]) | st.integers(1, 4))


class Queue:
    """A queue whose jobs start as soon as all that they wait for have ended, whatever their end."""

    def __init__(self) -> None:
        self.waits: dict[str, set[str]] = {}
        self.running: set[str] = set()

    def start(self) -> None:
        self.running |= {job for job, before in self.waits.items() if not before & self.waits.keys()}

    def remove(self, job: str) -> None:
        del self.waits[job]
        self.running.discard(job)


@settings(deadline=None)
@given(STEPS, st.randoms(use_true_random=False))
def test_no_more_than_the_limit_run_at_any_time(steps, draw):
    queue, lanes, count, most = Queue(), {}, 2, 2
    for number, step in enumerate(steps):
        active = list(queue.waits)
        draw.shuffle(active)
        if isinstance(step, int):
            # Jobs that were submitted under a higher limit keep theirs.
            count, most = step, max(step, len(queue.running), most if active else 0)
        elif step == "submit":
            lane, before = turn(active, lanes, count)
            lanes[str(number)] = lane
            queue.waits[str(number)] = set(before)
        elif step == "end" and queue.running:
            queue.remove(draw.choice(sorted(queue.running)))
        elif step == "cancel" and active:
            queue.remove(active[0])
        elif step == "forget" and active:
            # A job that someone has submitted by hand in the place of the sweep's.
            lanes.pop(active[0], None)
        queue.start()
        assert len(queue.running) <= most


def test_jobs_are_spread_over_the_lanes_and_wait_for_all_of_theirs():
    lanes, active, waits = {}, [], []
    for job in "abcde":
        lanes[job], before = turn(active, lanes, 2)
        active.append(job)
        waits.append("".join(before))
    assert waits == ["", "", "a", "b", "ac"]


def test_a_job_of_no_known_lane_is_waited_for_in_every_lane():
    assert turn(["x"], {}, 3) == (0, ["x"])
    assert turn(["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, 2) == (0, ["a", "c"])
