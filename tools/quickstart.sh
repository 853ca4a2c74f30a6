#!/usr/bin/env bash
# Sets up .venv and runs the main job on this machine: the tiny-deepseek-r1 recipe with every part real.
#   tools/quickstart.sh [--seed S] [-- recipe flags]
# Models, data and the run go to $BASE_DIR (default: build/quickstart in this folder).
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/tools/env.sh"

seed=0
while [ $# -gt 0 ]; do
    case "$1" in
    --seed)
        [ $# -ge 2 ] || { echo "error: --seed needs a whole number" >&2; exit 2; }
        seed="$2"
        shift 2
        ;;
    --)
        shift
        break
        ;;
    -h | --help)
        sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "error: unknown argument $1: quickstart.sh takes --seed S and, after --, recipe flags" >&2
        exit 2
        ;;
    esac
done

vime_env "$root"
export BASE_DIR="${BASE_DIR:-$root/build/quickstart}"
mkdir -p "$BASE_DIR"
cd "$root"
python="$root/.venv/bin/python"
"$python" tools/make_tiny_checkpoint.py --output-dir "$BASE_DIR" --seed "$seed"
run="tiny-deepseek-r1-seed$seed-$(date +%Y%m%d-%H%M%S)"
"$python" -m vime.submit --cluster local --recipe tiny-deepseek-r1 --nodes 1 --run-name "$run" \
    --base-dir "$BASE_DIR" -- --seed "$seed" --rollout-seed "$seed" "$@"
"$python" -m vime.report "$run"
