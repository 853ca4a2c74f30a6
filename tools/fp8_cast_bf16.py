"""Cast a block-fp8 HF checkpoint (DeepSeek-V3, R1) to bf16.

    python tools/fp8_cast_bf16.py --input-fp8-hf-path DeepSeek-R1 --output-bf16-hf-path DeepSeek-R1-bf16

Several processes on any nodes that share the file system divide the shard files among them: under `srun` or `torchrun`
without further arguments, or with --rank and --world-size. An interrupted cast is started again with the same command.
"""

from __future__ import annotations

import argparse
import os
import sys

from vime.checkpoint.cast import STALL_SECONDS, cast_to_bf16
from vime.errors import BadInput, VimeError


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks: given, or from torchrun's or Slurm's environment, or 0 of 1."""
    if (rank is None) != (world_size is None):
        raise BadInput("--rank and --world-size belong together: give both or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if all(name in os.environ for name in names):
            return int(os.environ[names[0]]), int(os.environ[names[1]])
    return 0, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-fp8-hf-path", required=True)
    parser.add_argument("--output-bf16-hf-path", required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--threads", type=int, help="threads of this process (default: the cores it may use)")
    parser.add_argument("--stall-timeout", type=float, default=STALL_SECONDS, help="seconds to wait for other ranks")
    arguments = parser.parse_args()
    try:
        rank, world_size = place(arguments.rank, arguments.world_size)
        cast_to_bf16(
            arguments.input_fp8_hf_path,
            arguments.output_bf16_hf_path,
            rank=rank,
            world_size=world_size,
            threads=arguments.threads,
            stall_s=arguments.stall_timeout,
        )
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.cause
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return BadInput.cause
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
