# Model arguments of Qwen3-4B, for those who call Megatron or the conversion by hand: source this file.
eval "MODEL_ARGS=($(python -m vime.plan --print-model-args qwen3-4b))"
