"""Converts a torch_dist checkpoint back to an HF folder, in bf16 or block fp8."""

import sys

from vime.checkpoint.export import main

if __name__ == "__main__":
    sys.exit(main())
