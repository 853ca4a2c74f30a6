#!/usr/bin/env bash
# Sets up .venv and passes the tests.
#   tools/test.sh            lint, types, then every test, fast ones first
#   tools/test.sh --fast     without the tests that start clusters, engines or several processes
#   tools/test.sh --full     every fault at 16 nodes, and of a real training, and every layout of the trainer too
#   tools/test.sh … -- ARGS  ARGS go to pytest
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/tools/env.sh"

select=()
options=()
while [ $# -gt 0 ]; do
    case "$1" in
    --fast) select=(-m "not e2e") ;;
    --full) options+=(--full) ;;
    --)
        shift
        break
        ;;
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "error: unknown argument $1: test.sh takes --fast, --full and, after --, pytest's arguments" >&2
        exit 2
        ;;
    esac
    shift
done

# The report is opened in a real browser, and programs of agents run in a real sandbox. Fast tests do without.
for pair in "chromium chromium the report" "bwrap bubblewrap the agents' sandbox"; do
    read -r program package what <<<"$pair"
    if [ ${#select[@]} -gt 0 ] || command -v "$program" >/dev/null; then
        continue
    fi
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "installing Debian's $package for the tests of $what"
        apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
            { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package" >/dev/null; }
    else
        echo "error: $package is missing for the tests of $what: install it, or run tools/test.sh --fast" >&2
        exit 2
    fi
done

vime_env "$root"
cd "$root"
bin="$root/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright" --threads 2
# Tests of the cluster wait most of the time: another process does the rest beside them.
exec "$bin/python" -m pytest --numprocesses 2 "${select[@]}" "${options[@]}" "$@"
