#!/usr/bin/env bash
# Everything that needs a GPU, for a machine that is lent for minutes: bash benchmarks/gpu.sh [tests|tune|kernels|towers ...]
# Needs python3 with torch, Triton and pytest, nothing installed. The parts share LIMIT_S seconds; each is stopped at its
# share and keeps what it has by then. Results go to OUT; changed.tar.gz holds the files of the tree that were rewritten.
# Where the tree has no git, give COMMIT: it is written beside the figures. ARGS="--op acceptance" tunes and times one op.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-.benchmarks/gpu}
[[ $# -gt 0 ]] || set -- tests tune kernels towers
STAGE_S=$((${LIMIT_S:-560} / $#))
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/vllm_plugin${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# tests/conftest.py looks for nvidia-smi to tell whether kernels run on the device.
export PATH="$PATH:/usr/local/nvidia/bin"
mkdir -p "$OUT"
results=()

run() { # part, command ...
    local part=$1 start=$SECONDS status
    shift
    echo "== $part: $*"
    timeout --kill-after=10 "$STAGE_S" "$@" >"$OUT/$part.log" 2>&1
    status=$?
    tail -n "${LINES_SHOWN:-25}" "$OUT/$part.log"
    results+=("$part: exit code $status after $((SECONDS - start)) s")
}

# The options of pyproject.toml need plugins that may be absent; what the tests do does not.
pytest=("$PYTHON" -m pytest -o addopts= -o timeout= -o filterwarnings= --import-mode=importlib -p no:cacheprovider -q)

# Side by side, where pytest can: most of the time goes into compiling. What test_compilation checks needs no GPU.
workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 6)
tests() { run tests "${pytest[@]}" ${workers[@]+"${workers[@]}"} --ignore=tests/kernels/test_compilation.py tests/kernels; }
tune() { run tune "$PYTHON" -m benchmarks.tune --seconds $((STAGE_S - 25)) ${ARGS:-}; }
kernels() { run kernels "$PYTHON" -m benchmarks.kernel_times --seconds $((STAGE_S - 25)) --json "$OUT/kernels.json" ${ARGS:-}; }
# Exit code 5: none of them runs on CUDA.
towers() { run towers "${pytest[@]}" benchmarks/bench_towers.py benchmarks/bench_generation.py -k cuda --benchmark-only --benchmark-json="$OUT/towers.json"; }

for part in "$@"; do
    case $part in
        tests | tune | kernels | towers) "$part" ;;
        *) echo "gpu.sh: $part is no part; choose among tests, tune, kernels, towers" >&2; exit 2 ;;
    esac
done
tar -czf "$OUT/changed.tar.gz" kernels/README.md kernels/twotower_kernels/*/tuned.json
echo "== results in $OUT; to take them over: tar -xzf changed.tar.gz in the root of the tree"
printf '%s\n' "${results[@]}"
[[ "${results[*]}" != *"exit code "[1-9]* ]]
