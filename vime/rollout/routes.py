"""Routes that engines return with their answers: their shape in an answer, and the rows of samples until training."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vime.errors import DataError
from vime.models.config import ModelConfig
from vime.run.routes import routes_path, write_routes
from vime.samples import Sample


@dataclass(frozen=True)
class RouteShape:
    """Layout of a row of routes."""

    layers: int
    """Layers of the model without draft layers. Layers without experts have meaningless rows."""
    top_k: int
    experts: int

    @classmethod
    def of(cls, config: ModelConfig) -> RouteShape:
        assert config.moe is not None
        return cls(config.num_layers, config.moe.top_k, config.moe.num_experts)

    def decode(self, text: str | None, rows: int) -> np.ndarray:
        """Rows, [rows, layers, top-k], from vLLM's base64 of an npy file. Raises ValueError with what is wrong."""
        if text is None:
            raise ValueError("answer has no routes: the engine was started without --enable-return-routed-experts")
        try:
            found = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
        except (binascii.Error, ValueError, EOFError) as error:
            raise ValueError(f"routes are no npy file: {error}") from error
        if found.dtype.kind not in "ui" or found.shape != (rows, self.layers, self.top_k):
            raise ValueError(
                f"routes have type {found.dtype} and shape {list(found.shape)} instead of "
                f"{[rows, self.layers, self.top_k]} (tokens but the last, layers, experts a token)"
            )
        return found


@dataclass(frozen=True)
class RoutesAsked:
    """Routes that one answer has to bring."""

    shape: RouteShape
    start: int
    """Rows that are there from the sample's earlier answers."""
    prompt: int
    """Tokens of the request."""

    def decode(self, text: str | None, tokens: int) -> np.ndarray:
        """The rows of an answer of this many tokens. Raises ValueError with what is wrong."""
        if not tokens:
            # Aborted before the first token: the request that continues it brings all rows.
            return np.empty((0, self.shape.layers, self.shape.top_k), np.uint8)
        return self.shape.decode(text, self.prompt + tokens - 1 - self.start)


@dataclass
class RouteBook:
    """Rows of all samples under way until their rollout's file is written."""

    shape: RouteShape
    run_dir: Path
    _rows: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)
    """By the sample's number and branch."""

    def ask(self, sample: Sample) -> RoutesAsked:
        """Rows that the sample's next answer has to bring."""
        return RoutesAsked(self.shape, self._count(sample), sample.length)

    def covers(self, sample: Sample) -> bool:
        """True if the rows of the sample's tokens so far are here: a resumed run has none."""
        return not sample.response_ids or self._count(sample) == sample.length - 1

    def add(self, sample: Sample, rows: np.ndarray) -> None:
        """Append the rows of an answer."""
        if len(rows):
            self._rows.setdefault(_key(sample), []).append(rows)

    def forget(self, sample: Sample) -> None:
        """Forget the rows of a sample."""
        self._rows.pop(_key(sample), None)

    def keep(self, samples: Iterable[Sample]) -> None:
        """Forget the rows of all samples but these."""
        keys = {_key(sample) for sample in samples}
        self._rows = {key: rows for key, rows in self._rows.items() if key in keys}

    def write(self, rollout_id: int, samples: Sequence[Sample]) -> int:
        """Write the rows of a rollout's samples and forget them; returns bytes. Raises DataError for rows that are
        missing or too many."""
        stacked = []
        for sample in samples:
            rows = self._rows.get(_key(sample), [])
            wanted, found = sample.length - 1, sum(map(len, rows))
            if sample.response_ids and found != wanted:
                raise DataError(f"sample {sample.index} has {found} rows of routes for {sample.length} tokens")
            empty = np.empty((0, self.shape.layers, self.shape.top_k), np.uint8)
            stacked.append(np.concatenate(rows) if sample.response_ids else empty)
        size = write_routes(routes_path(self.run_dir, rollout_id), stacked, experts=self.shape.experts)
        for sample in samples:
            self._rows.pop(_key(sample), None)
        return size

    def _count(self, sample: Sample) -> int:
        return sum(map(len, self._rows.get(_key(sample), [])))


def _key(sample: Sample) -> tuple[int, int]:
    return sample.index, sample.branch
