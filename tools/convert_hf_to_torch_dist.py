"""Convert an HF checkpoint (bf16 or block fp8) to Megatron's torch_dist.

    torchrun --nproc-per-node 8 tools/convert_hf_to_torch_dist.py [MODEL ARGUMENTS] --pipeline-model-parallel-size 8 \
        --hf-checkpoint DeepSeek-R1 --save DeepSeek-R1_torch_dist

Under `srun` directly, under torchrun, or alone. An interrupted conversion goes on with the same command; with --verify
nothing is written, and all bytes of an output are compared with what the conversion makes.
"""

import sys

from vime.checkpoint.convert import main

if __name__ == "__main__":
    sys.exit(main())
