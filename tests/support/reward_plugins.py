"""Reward functions and filters that tests load as `reward_plugins:function` in worker processes."""

import os
import signal
import time


def right(sample):
    return float(sample.response == sample.label)


def slow_on_odd(sample):
    if int(sample.label) % 2:
        time.sleep(0.3)
    return right(sample)


def takes_a_while(sample):
    time.sleep(0.05)
    return right(sample)


def hangs_on_seven(sample):
    while sample.label == "7":
        time.sleep(0.01)
    return right(sample)


def hangs_deaf(sample):
    if sample.label == "7":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(3600)
    return right(sample)


def dies_on_seven(sample):
    if sample.label == "7":
        os._exit(3)
    return right(sample)


def raises_on_seven(sample):
    if sample.label == "7":
        raise LookupError("no seven here")
    return right(sample)


def always_raises(sample):
    raise LookupError("never")


def prints(sample):
    print("this must not reach the protocol", flush=True)
    return right(sample)


def not_finite(sample):
    return float("nan")


def rank_by_length(samples):
    order = sorted(samples, key=lambda sample: len(sample.response_ids))
    return [float(order.index(sample)) for sample in samples]


def keeps_even(group):
    return int(group.samples[0].label) % 2 == 0


def unsolved_first(histories):
    return [0.25 if history.rewards[-1] == 1.0 else 1.0 for history in histories]
