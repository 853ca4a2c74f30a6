"""Converts an HF checkpoint (bf16 or block fp8) to Megatron's torch_dist; start it with torchrun, srun or alone."""

import sys

from vime.checkpoint.convert import main

if __name__ == "__main__":
    sys.exit(main())
