"""Test program: builds real Megatron models from checkpoints. Runs alone or under torchrun.

`logits OUT FOLDER…` saves the logits of every HF folder loaded directly (`HF@TORCH_DIST`: loaded from the torch_dist);
`compare TORCH_DIST HF TP PP EP` loads both into two models of this layout, with Megatron's own loader and vime's, and
fails if a weight differs.
"""

from __future__ import annotations

import os
import socket
import sys

import torch

from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.load import load_hf_into
from vime.checkpoint.torch_dist import checkpoint_folder, use_disk_keys
from vime.megatron.model import build_model
from vime.megatron.parallel import init_parallel
from vime.recipe.parallel import ParallelLayout

SEQUENCES, LENGTH = 2, 48


def tokens(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def start(layout: ParallelLayout):
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    return init_parallel(layout)


def load_torch_dist(chunks, folder: str, config) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    state = {"model": chunks[0].sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))}
    use_disk_keys(state, config)
    loaded = dist_checkpointing.load(state, str(checkpoint_folder(folder)))
    chunks[0].load_state_dict(loaded["model"], strict=True)


def logits(out: str, folders: list[str]) -> None:
    layout = ParallelLayout()
    coords = start(layout)
    found = {}
    for folder in folders:
        hf, _, torch_dist = folder.partition("@")
        checkpoint = HFCheckpoint(hf)
        chunks = build_model(checkpoint.config, layout, bf16=False)
        if torch_dist:
            load_torch_dist(chunks, torch_dist, checkpoint.config)
        else:
            load_hf_into(chunks, checkpoint, checkpoint.config, layout, coords)
        ids = tokens(checkpoint.config.vocab_size)
        positions = torch.arange(LENGTH)[None].expand(SEQUENCES, -1)
        with torch.no_grad():
            found[folder] = chunks[0].eval()(ids, positions, None)
    torch.save(found, out)


def compare(torch_dist: str, hf: str, tp: int, pp: int, ep: int) -> None:
    world = int(os.environ["WORLD_SIZE"])
    layout = ParallelLayout(world_size=world, tp=tp, pp=pp, ep=ep, sequence_parallel=tp > 1)
    coords = start(layout)
    checkpoint = HFCheckpoint(hf)
    ours, theirs = (build_model(checkpoint.config, layout, bf16=False, mtp=True) for _ in range(2))
    load_hf_into(ours, checkpoint, checkpoint.config, layout, coords)
    load_torch_dist(theirs, torch_dist, checkpoint.config)
    compared = 0
    for (name, a), (_, b) in zip(ours[0].state_dict().items(), theirs[0].state_dict().items(), strict=True):
        if torch.is_tensor(a):
            assert torch.equal(a, b), f"rank {coords.rank}: {name} differs"
            compared += 1
    assert compared > 10


if __name__ == "__main__":
    if sys.argv[1] == "logits":
        logits(sys.argv[2], sys.argv[3:])
    else:
        compare(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:7]))
