"""Names and shapes of block fp8, without torch: the tensors a checkpoint quantises, and how it stores scales."""

from __future__ import annotations

from collections.abc import Sequence

from vime.models.config import Quantisation

SCALE_SUFFIX = "_scale_inv"
Block = tuple[int, int]


def scale_name(name: str) -> str:
    """Name of a quantised tensor's scales."""
    return name + SCALE_SUFFIX


def scale_shape(shape: Sequence[int], block: Block) -> tuple[int, int]:
    """Number of blocks of a matrix in each dimension, rounded up."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def is_quantised(name: str, by_default: bool, config: Quantisation | None) -> bool:
    """True if a checkpoint with this `quantization_config` stores the tensor in fp8.

    `by_default` is the model family's table entry. `modules_to_not_convert` lists modules by full or partial path.
    """
    if config is None or not by_default:
        return False
    module = name.rpartition(".")[0]
    return not any(f".{skipped}." in f".{module}." for skipped in config.modules_to_not_convert or ())
