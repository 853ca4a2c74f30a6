"""Warnings that no user can act on stay out of the log; all others are printed."""

from __future__ import annotations

import warnings

import pytest

from vime.megatron.backend import ignore_known_warnings


@pytest.mark.parametrize(
    ("text", "category", "printed"),
    [
        ("`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.", FutureWarning, False),
        ("Apex is not installed. Falling back to Torch Norm", UserWarning, False),
        ("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", UserWarning, False),
        ("full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.", UserWarning, False),
        ("`load_state_dict` is deprecated and will be removed in future versions.", FutureWarning, False),
        ("Please use DTensor instead and we are deprecating ShardedTensor.", FutureWarning, False),
        ("TypedStorage is deprecated. It will be removed in the future.", UserWarning, False),
        ("The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.", UserWarning, False),
        ("`torch.save` is deprecated", FutureWarning, True),
        ("Transformer Engine is too old", UserWarning, True),
    ],
)
def test_only_known_warnings_are_left_out(text: str, category: type[Warning], printed: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.resetwarnings()
        ignore_known_warnings()
        warnings.warn(text, category, stacklevel=1)
    assert bool(found) == printed
