"""Cast a block-fp8 HF checkpoint (DeepSeek-V3, R1) to bf16.

    python tools/fp8_cast_bf16.py --input-fp8-hf-path DeepSeek-R1 --output-bf16-hf-path DeepSeek-R1-bf16

Several processes on any nodes that share the file system divide the shard files among them: under `srun` or `torchrun`
without further arguments, or with --rank and --world-size. An interrupted cast is started again with the same command.
"""

import sys

from vime.checkpoint.cast import main

if __name__ == "__main__":
    sys.exit(main())
