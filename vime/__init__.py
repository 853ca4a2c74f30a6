"""Reinforcement learning of very large models on Slurm clusters with Megatron-core and vLLM."""

__version__ = "0.2.0"
