#!/usr/bin/env bash
# DeepSeek-R1 on 16 nodes of 8 H100: the recipe as arrays of flags, submitted to Slurm from a login node.
# Further words are options of vime.submit: bash scripts/run-deepseek-r1.sh --dry-run
set -euo pipefail
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/deepseek-v3.sh"

CKPT_ARGS=(
   --hf-checkpoint $BASE_DIR/DeepSeek-R1/
   --ref-load $BASE_DIR/DeepSeek-R1_torch_dist/
   --load $BASE_DIR/DeepSeek-R1_vime/
   --save $BASE_DIR/DeepSeek-R1_vime/
   --save-interval 20
)
PERF_ARGS=(
   --tensor-model-parallel-size 8
   --sequence-parallel
   --pipeline-model-parallel-size 4
   --context-parallel-size 4
   --expert-model-parallel-size 32
   --expert-tensor-parallel-size 1
   --decoder-last-pipeline-num-layers 13

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
)
GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)
OPTIMIZER_ARGS=(
   --optimizer-cpu-offload
   --overlap-cpu-optimizer-d2h-h2d
   --use-precision-aware-optimizer
)
VLLM_ARGS=(
   --rollout-num-gpus-per-engine 64
   --vllm-gpu-memory-utilization 0.7
   --vllm-enable-expert-parallel
   --vllm-data-parallel-size 8
   --vllm-server-concurrency 1024
)
MISC_ARGS=(
   --moe-enable-deepep
   --moe-token-dispatcher-type flex
)

# The recipe holds what no array says: data, rollout, learning rate.
exec python -m vime.submit --recipe deepseek-r1 --nodes 16 "$@" -- \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" "${VLLM_ARGS[@]}" "${MISC_ARGS[@]}"
