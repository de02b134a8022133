#!/usr/bin/env bash
# Everything that needs a GPU, for a machine that is lent for minutes: bash benchmarks/gpu.sh [PART ...]
#
#   sanity    a GPU is really there and our kernels really run on it; comes first always, and nothing is run without it
#   goldens   golden checkpoints on the device against the CPU, in every mode, and the drafter
#   tests     kernel tests on the device
#   towers    steps and extensions at the published geometry, eager and as graphs, against the floor; a profile by kernel
#   vllm      the trio in real vLLM, runners V1 and V2: texts in float32, speed in bfloat16; left out where vLLM is not
#   kernels   short tables of the kernels beside their rivals, experts first
# and, only when they are named:
#   tune      chooses the settings of the kernels, experts first
#   tables    the whole tables, which go into kernels/README.md
#
# Needs python3 with what the core needs (sanity names what is missing) and pytest; nothing needs to be installed. The parts
# share LIMIT_S seconds by weight; each is stopped at its share. Each writes its own file in OUT as it goes, so that a run
# that is cut short loses its last part alone. changed.tar.gz holds the files of the tree that were rewritten. Where the tree
# has no git, give COMMIT: it is written beside the figures. ARGS="--op acceptance" tunes and times one op, DEVICE chooses
# among several GPUs; DEVICE=cpu is a trial of sanity, goldens, towers and vllm without one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A weight=([sanity]=25 [goldens]=90 [tests]=85 [towers]=90 [vllm]=140 [kernels]=50 [tune]=480 [tables]=480)
[[ $# -gt 0 ]] || set -- sanity goldens tests towers vllm kernels
for part in "$@"; do
    [[ -v weight[$part] ]] || { echo "gpu.sh: $part is no part; choose among sanity, goldens, tests, towers, vllm, kernels, tune, tables" >&2; exit 2; }
done
[[ $1 == sanity ]] || set -- sanity "$@"

OUT=${OUT:-.benchmarks/gpu} DEVICE=${DEVICE:-cuda:0} PYTHON=${PYTHON:-python3} LIMIT_S=${LIMIT_S:-480}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/vllm_plugin:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Where containers have what comes with the driver: nvidia-smi, and NVML, without which vLLM finds no GPU.
export PATH="$PATH:/usr/local/nvidia/bin" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64"
mkdir -p "$OUT"
total=0 failed=0
for part in "$@"; do total=$((total + weight[$part])); done

share() { echo $((LIMIT_S * weight[$1] / total)); }

run() { # part, command ...
    local part=$1 start=$SECONDS status
    shift
    echo "== $part, up to $(share "$part") s: $*"
    timeout --kill-after=10 "$(share "$part")" "$@" >"$OUT/$part.log" 2>&1
    status=$?
    tail -n "${LINES_SHOWN:-25}" "$OUT/$part.log"
    [[ $status -eq 0 ]] || failed=1
    echo "$part: exit code $status after $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    return $status
}

module() { run "$1" "$PYTHON" -m "twotower_bench.gpu.$2" "$DEVICE" "$OUT/$1.jsonl"; }

# The options of pyproject.toml need plugins that may be absent; what the tests do does not. With this variable no test runs in
# Triton's interpreter. What test_compilation checks needs no GPU.
pytest=("$PYTHON" -m pytest -o addopts= -o timeout= -o filterwarnings= --import-mode=importlib -p no:cacheprovider -v --tb=short)
sanity() { module sanity sanity; }
goldens() { module goldens goldens; }
tests() {
    local workers=() # side by side, where pytest can: most of the time goes into compiling
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 6)
    KERNEL_TESTS=cuda run tests "${pytest[@]}" ${workers[@]+"${workers[@]}"} --ignore=tests/kernels/test_compilation.py \
        tests/kernels tests/towers/test_initialisation.py
}
towers() { module towers towers; }
vllm() {
    # There may be no network, and no FlashInfer; what is set already stays.
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1}
    export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
    if "$PYTHON" -c 'import vllm' 2>"$OUT/vllm.log"; then
        module vllm serving
    else
        echo "vllm: left out, it cannot be imported ($(tail -n 1 "$OUT/vllm.log"))" | tee -a "$OUT/summary.txt"
    fi
}
kernels() { run kernels "$PYTHON" -m benchmarks.kernel_times --quick --seconds $(($(share kernels) - 10)) --json "$OUT/kernels.json" ${ARGS:-}; }
tables() { run tables "$PYTHON" -m benchmarks.kernel_times --seconds $(($(share tables) - 25)) --json "$OUT/tables.json" ${ARGS:-}; }
tune() { run tune "$PYTHON" -m benchmarks.tune --seconds $(($(share tune) - 25)) ${ARGS:-}; }

: >"$OUT/summary.txt"
for part in "$@"; do
    "$part" || [[ $part != sanity ]] || exit 1
    case $part in
        tune | tables) tar -czf "$OUT/changed.tar.gz" kernels/README.md kernels/twotower_kernels/*/tuned.json ;;
    esac
done
echo "== results in $OUT"
[[ ! -e $OUT/changed.tar.gz ]] || echo "to take over what was rewritten: tar -xzf changed.tar.gz in the root of the tree"
cat "$OUT/summary.txt"
exit $failed
