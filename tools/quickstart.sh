#!/usr/bin/env bash
# Sets up .venv and runs the main job on this machine: the tiny-deepseek-r1 recipe with every part real.
#   tools/quickstart.sh [--gpu] [--seed S] [-- recipe flags]
# --gpu: on one GPU, which trainer and engine share, instead of on processors.
# Models, data and the run go to $BASE_DIR (default: build/quickstart in this folder, build/quickstart-gpu with --gpu).
# VIME_PYTHON: interpreter of an environment that has everything; no .venv is set up then.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/tools/env.sh"

seed=0
device=cpu
while [ $# -gt 0 ]; do
    case "$1" in
    --seed)
        [ $# -ge 2 ] || { echo "error: --seed needs a whole number" >&2; exit 2; }
        seed="$2"
        shift 2
        ;;
    --gpu)
        device=gpu
        shift
        ;;
    --)
        shift
        break
        ;;
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "error: unknown argument $1: quickstart.sh takes --gpu, --seed S and, after --, recipe flags" >&2
        exit 2
        ;;
    esac
done

if [ "$device" = gpu ] && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
    echo "error: --gpu: nvidia-smi shows no GPU on this machine: leave --gpu out, or run on a machine that has one" >&2
    exit 2
fi
if [ -z "${VIME_PYTHON:-}" ]; then
    vime_env "$root" "$device"
fi
export BASE_DIR="${BASE_DIR:-$root/build/quickstart$([ "$device" = cpu ] || echo "-$device")}"
mkdir -p "$BASE_DIR"
cd "$root"
python="${VIME_PYTHON:-$root/.venv/bin/python}"
"$python" tools/make_tiny_checkpoint.py --output-dir "$BASE_DIR" --seed "$seed" --device "$device"
run="tiny-deepseek-r1-seed$seed-$(date +%Y%m%d-%H%M%S)"
"$python" -m vime.submit --cluster local --recipe tiny-deepseek-r1 --nodes 1 --run-name "$run" \
    --base-dir "$BASE_DIR" -- --device "$device" --seed "$seed" --rollout-seed "$seed" "$@"
"$python" -m vime.report "$run"
