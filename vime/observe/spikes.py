"""Spikes of training's signals: values far off those of the rollouts before. Pure.

A value spikes if it lies more than `factor` spreads from the median of the window in the harmful direction. The spread
is 1.4826 x the median absolute deviation, the standard deviation for normal values (Rousseeuw and Croux, Alternatives
to the median absolute deviation, 1993), but at least a share of the median or an absolute floor: signals that hardly
move must not spike by moving a little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

WINDOW, FEWEST = 32, 8
"""Rollouts in the window, and values before any can spike."""


@dataclass(frozen=True)
class Signal:
    """A metric and its harmful direction."""

    name: str
    harmful: int
    """+1: a rise is harmful, -1: a fall."""
    share: float = 0.0
    """Smallest spread as a share of the median."""
    floor: float = 0.0
    """Smallest spread, absolute."""


GRAD_NORM = Signal("train/grad_norm", +1, share=0.5)
SIGNALS = (
    GRAD_NORM,
    Signal("train/loss", +1, floor=1e-2),
    Signal("train/train_rollout_logprob_abs_diff", +1, share=0.5, floor=1e-3),
    Signal("rollout/raw_reward", -1, floor=2e-2),
)


@dataclass
class Window:
    """Newest values of one signal, by rollout or optimizer step, that were no spikes."""

    signal: Signal
    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def spreads(self, value: float) -> float:
        """Distance from the median in spreads, positive in the harmful direction; 0 while the values are too few."""
        if len(self.values) < FEWEST:
            return 0.0
        middle = median(self.values)
        deviation = 1.4826 * median(abs(each - middle) for each in self.values)
        spread = max(deviation, self.signal.share * abs(middle), self.signal.floor)
        return self.signal.harmful * (value - middle) / spread if spread else 0.0

    def text(self, value: float) -> str:
        """The spike in words."""
        return (
            f"{self.signal.name} is {value:.4g}, {self.spreads(value):.1f} spreads from the median "
            f"{median(self.values):.4g} of {len(self.values)} before it"
        )


class SpikeWatch:
    """Windows of all signals, fed with the metrics of each rollout."""

    def __init__(self, factor: float) -> None:
        """`factor`: spreads above which a value is a spike."""
        self._factor = factor
        self._windows = [Window(signal) for signal in SIGNALS]

    def add(self, metrics: Mapping[str, float]) -> str:
        """Take a rollout's metrics; return its first spike in words, empty if there is none."""
        found = ""
        for window in self._windows:
            value = metrics.get(window.signal.name)
            if value is None:
                continue
            # Written so that NaN is a spike.
            if window.values and not window.spreads(value) <= self._factor:
                found = found or window.text(value)
            else:
                window.values.append(value)
        return found
