# Model arguments of DeepSeek-V3 and R1, for those who call Megatron or the conversion by hand: source this file.
eval "MODEL_ARGS=($(python -m vime.plan --print-model-args deepseek-v3))"
