"""Converts an HF checkpoint (block fp8 or not) to Megatron's torch_dist, in one pass, by any number of ranks.

Every box of every parameter is read, dequantised and written by exactly one rank, one at a time, so that a rank holds
one tensor at a time. The layout decides how boxes are cut and assigned; the result loads at any other layout.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vime.checkpoint import dist_save
from vime.checkpoint.dist_save import Chunk
from vime.checkpoint.dist_writer import FILE_BYTES
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.progress import Progress
from vime.checkpoint.ranks import from_environment, process_group
from vime.checkpoint.safetensors_file import same_bytes
from vime.checkpoint.torch_dist import TorchDistReader, object_name
from vime.errors import BadInput, VimeError
from vime.models.arguments import check_model_args
from vime.models.checkpoint_args import checkpoint_args
from vime.models.config import ModelConfig
from vime.models.disk import DiskPlace, disk_place, extra_states
from vime.models.families import params_of, stage_of
from vime.models.namemap import Join, Param
from vime.models.shards import Piece, check_layout, local_shape, pieces
from vime.recipe.flags import find_target, flag, parse_flags
from vime.recipe.parallel import ParallelLayout
from vime.recipe.tables import MEGATRON_MODEL_FLAGS
from vime.run.checkpoints import RELEASE

# More writers than this do not make a file system faster.
MAX_THREADS = 8
TIMEOUT = datetime.timedelta(hours=6)
VERIFY = "--verify"
_OF_TRAINING = {
    "accumulate_allreduce_grads_in_fp32", "attention_backend", "attention_dropout", "attention_softmax_in_fp32", "bf16",
    "hidden_dropout", "moe_enable_deepep", "moe_token_dispatcher_type", "mtp_num_layers", "seed",
}  # fmt: skip
"""Megatron flags that vime's recipe knows but a conversion does not need."""
_LAYOUT_FLAGS = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "decoder_first_pipeline_num_layers": "first_stage_layers",
    "decoder_last_pipeline_num_layers": "last_stage_layers",
}


@dataclass(frozen=True)
class Work:
    """One box of a parameter: its source, its destination and its rank."""

    param: Param
    pieces: tuple[Piece, ...]
    place: DiskPlace
    offset: tuple[int, ...]
    """Offset of the box in the parameter."""
    size: tuple[int, ...]
    owner: int


def convert(
    checkpoint: HFCheckpoint,
    save_dir: Path,
    layout: ParallelLayout,
    rank: int,
    *,
    threads: int | None = None,
    file_bytes: int = FILE_BYTES,
) -> bool:
    """Convert with all ranks of the default process group; returns False if already done. Collective.

    An interrupted conversion of this source at this layout is resumed, file by file of `file_bytes`.

    Raises BadInput, before anything is written, for an incomplete checkpoint, a layout that the model does not allow, a
    target that holds a checkpoint, or a disk that is too small.
    """
    config = checkpoint.config
    check_layout(config, layout)
    params = params_of(config)
    checkpoint.check(params)
    types = stored_types(checkpoint, params)
    work = deal_out(config, layout)
    sizes = [torch.Size(w.size).numel() * types[w.place.key].itemsize for w in work]
    mine = [(w, size) for w, size in zip(work, sizes, strict=True) if w.owner == rank]
    progress = Progress(f"convert, rank {rank} of {layout.world_size}:", sum(size for _, size in mine))
    made = dist_save.save(
        save_dir,
        [_chunk(checkpoint, w, types[w.place.key]) for w, _ in mine],
        {
            object_name(state.key, state.index, state.stack): None
            for w, _ in mine
            if not any(w.offset)
            for state in extra_states(w.param, checkpoint.config)
        },
        {
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "args": checkpoint_args(config, ParallelLayout(), mtp=config.mtp_layers > 0, with_optimizer=False),
            "vime": {"hf_config": dict(config.hf)},
        },
        made_from=checkpoint.fingerprint(),
        cut=dataclasses.asdict(layout),
        threads=threads or threads_of_a_rank(),
        file_bytes=file_bytes,
        said=progress.add,
    )
    if made:
        progress.close()
    return made


def verify(checkpoint: HFCheckpoint, save_dir: Path, layout: ParallelLayout, rank: int) -> None:
    """Read this rank's share of source and output, all bytes, and compare; the ranks do not communicate.

    Raises BadInput with the tensor for the first difference.
    """
    params = params_of(checkpoint.config)
    checkpoint.check(params)
    types = stored_types(checkpoint, params)
    reader = TorchDistReader(save_dir / RELEASE, checkpoint.config)
    mine = [work for work in deal_out(checkpoint.config, layout) if work.owner == rank]
    total = sum(torch.Size(work.size).numel() * types[work.place.key].itemsize for work in mine)
    progress = Progress(f"verify, rank {rank} of {layout.world_size}:", total)

    def one(work: Work) -> None:
        expected = _load(checkpoint, work, types[work.place.key]).to(types[work.place.key])
        found = reader.read_box(work.param, work.offset, work.size)
        if found.dtype != expected.dtype or not same_bytes(found, expected):
            names = " and ".join(work.param.parts[piece.part].name for piece in work.pieces[:2])
            raise BadInput(
                f"{reader.path}: {work.place.key} at {list(work.offset)} is not what the conversion makes of {names} "
                f"in {checkpoint.path}: verify the source (python -m vime.fetch --check), then convert again"
            )
        progress.add(found.nbytes)

    with ThreadPoolExecutor(threads_of_a_rank()) as pool:
        list(pool.map(one, mine))
    progress.close()


def threads_of_a_rank() -> int:
    """This rank's share of its node's cores (divided by LOCAL_WORLD_SIZE or Slurm's tasks on this node)."""
    beside = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0]
    share = len(os.sched_getaffinity(0)) // (int(beside) if beside.isdigit() else 1)
    return max(1, min(share, MAX_THREADS))


def stored_types(checkpoint: HFCheckpoint, params: Sequence[Param]) -> dict[str, torch.dtype]:
    """Dtype of every key: that of its HF tensors (bf16 for fp8), or the widest if a key's parameters differ."""
    types: dict[str, torch.dtype] = {}
    for param in params:
        key = disk_place(param, checkpoint.config).key
        for part in param.parts:
            found = torch.bfloat16 if checkpoint.is_quantised(part.name) else checkpoint.info(part.name).dtype
            found = torch.float32 if param.fp32 else found
            types[key] = torch.promote_types(types.get(key, found), found)
    return types


def deal_out(config: ModelConfig, layout: ParallelLayout) -> list[Work]:
    """All boxes of the model with their owners; the same on every rank.

    The owner is the rank with the fewest elements so far in the box's pipeline stage, expert group and tensor shard.
    """
    holders: dict[tuple[int, int, int, bool], list[int]] = defaultdict(list)
    for coords in map(layout.coordinates, range(layout.world_size)):
        holders[coords.pp, 0, coords.tp, False].append(coords.rank)
        holders[coords.pp, coords.ep, coords.etp, True].append(coords.rank)
    load = [0] * layout.world_size
    found = []
    for param in params_of(config):
        stage, group, routed = stage_of(param, layout, config.num_layers), 0, param.expert is not None
        if routed:
            assert config.moe is not None
            assert param.expert is not None
            group = param.expert // (config.moe.num_experts // layout.ep)
        shards = 1 if param.tp_dim is None else layout.etp if routed else layout.tp
        for index in range(shards):
            candidates = holders[stage, group, index, routed]
            if param.tp_dim is None:
                # Replicated on every rank of the stage or expert group: any may write it.
                size = layout.etp if routed else layout.tp
                candidates = [rank for i in range(size) for rank in holders[stage, group, i, routed]]
            owner = min(candidates, key=lambda rank: (load[rank], rank))
            for work in _boxes(param, disk_place(param, config), index, shards, owner):
                load[owner] += torch.Size(work.size).numel()
                found.append(work)
    return found


def _boxes(param: Param, place: DiskPlace, index: int, shards: int, owner: int) -> Iterator[Work]:
    """Boxes of one shard: one per piece, except that a shard's interleaved q, k and v form one box."""
    found = pieces(param, index, shards)
    if param.join == Join.QKV:
        shape = local_shape(param, shards)
        yield Work(param, found, place, (index * shape[0], *(0 for _ in shape[1:])), shape, owner)
        return
    for piece in found:
        above = sum(part.shape[0] for part in param.parts[: piece.part])
        yield Work(param, (piece,), place, (above + piece.start[0], *piece.start[1:]), piece.size, owner)


def _chunk(checkpoint: HFCheckpoint, work: Work, dtype: torch.dtype) -> Chunk:
    place = work.place
    ones = (1,) * len(place.index)
    return Chunk(
        key=place.key,
        shape=place.stack + work.param.shape,
        offset=place.index + work.offset,
        size=ones + work.size,
        dtype=dtype,
        load=functools.partial(_load, checkpoint, work, dtype),
    )


def _load(checkpoint: HFCheckpoint, work: Work, dtype: torch.dtype) -> torch.Tensor:
    if len(work.pieces) == 1:
        return _read(checkpoint, work.param, work.pieces[0], dtype)
    target = torch.empty(work.size, dtype=dtype)
    for piece in work.pieces:
        target[piece.target] = _read(checkpoint, work.param, piece, dtype)
    return target


def _read(checkpoint: HFCheckpoint, param: Param, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    return checkpoint.read(param.parts[piece.part].name, piece.start, piece.size, dtype)


def read_arguments(argv: Sequence[str], world_size: int) -> tuple[HFCheckpoint, Path, ParallelLayout]:
    """Parse the arguments: model flags (checked against `config.json`), parallel sizes, --hf-checkpoint, --save."""
    given = dict(parse_flags([word for word in argv if word != VERIFY], megatron=True))
    paths = {name: given.pop(name, None) for name in ("hf_checkpoint", "save")}
    sizes = {ours: given.pop(name) for name, ours in _LAYOUT_FLAGS.items() if name in given}
    model = {name: given.pop(name) for name in list(given) if name in MEGATRON_MODEL_FLAGS}
    for name in given:
        if not _says_nothing(name):
            raise BadInput(f"{flag(name)} has no meaning for the conversion: leave it out")
    for name, path in paths.items():
        if path is None:
            raise BadInput(f"{flag(name)} is missing: give a folder")
    numbers: dict[str, Any] = {name: _whole(name, size) for name, size in sizes.items() if size is not None}
    layout = ParallelLayout(world_size=world_size, **numbers)
    checkpoint = HFCheckpoint(str(paths["hf_checkpoint"]))
    check_model_args(checkpoint.config, model)
    return checkpoint, Path(str(paths["save"])), layout


def ignored_flags(argv: Sequence[str]) -> list[str]:
    """Command-line flags that Megatron knows but that do not affect a conversion."""
    names = dict(parse_flags([word for word in argv if word != VERIFY], megatron=True))
    return [flag(name) for name in names if name not in _LAYOUT_FLAGS and _says_nothing(name)]


def _says_nothing(name: str) -> bool:
    target = find_target(name, megatron=True)
    return target.group in ("", "perf", "optimizer") or name in _OF_TRAINING


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise BadInput(f"parallel size {name} is {value!r}: give a whole number") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion as this process's rank; returns the exit code."""
    try:
        words = sys.argv[1:] if argv is None else argv
        ranks = from_environment()
        checkpoint, save_dir, layout = read_arguments(words, ranks.world_size)
        if ranks.rank == 0 and (ignored := ignored_flags(words)):
            print(f"note: no meaning for the conversion: {', '.join(ignored)}", flush=True)
        if VERIFY in words:
            verify(checkpoint, save_dir, layout, ranks.rank)
            return 0
        with process_group(ranks, TIMEOUT):
            made = convert(checkpoint, save_dir, layout, ranks.rank)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    except OSError as error:
        print(f"error: {error.filename or save_dir}: {error.strerror}", file=sys.stderr)
        return int(BadInput.cause)
    if ranks.rank == 0:
        print(f"{save_dir / RELEASE} is complete" if made else f"{save_dir / RELEASE} was complete already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
