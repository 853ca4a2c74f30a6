# Sourced by tools/quickstart.sh and tools/test.sh: `vime_env ROOT [cpu|gpu]` makes .venv with everything that runs on
# processors alone, or on GPUs. A stamp of pyproject.toml and setup.cfg keeps a second call short.

# Hundreds of processes import the same modules: they share the compiled ones, whatever the caller's environment says.
export PYTHONDONTWRITEBYTECODE=

vime_env() {
    local root="$1" device="${2:-cpu}" venv stamp wanted links source=()
    venv="$root/.venv"
    stamp="$venv/.vime-installed"
    wanted="$device $(cat "$root/pyproject.toml" "$root/setup.cfg" "$root/tools/cpu-overrides.txt" | sha256sum | cut -d' ' -f1)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is older than Python 3.11: set PYTHON to a newer one" >&2
        return 2
    }
    echo "setting up $venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    # uv does not read pip's settings; a local folder of wheels named there may hold the CPU build of torch.
    links="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}}"
    if [ -n "$links" ]; then
        export UV_FIND_LINKS="$links"
    else
        source=(--torch-backend "$([ "$device" = gpu ] && echo auto || echo cpu)")
    fi
    [ "$device" = gpu ] || source+=(--overrides "$root/tools/cpu-overrides.txt")
    (cd "$root" && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "${source[@]}" -e ".[$device,test]")
    echo "$wanted" >"$stamp"
}
