#!/usr/bin/env bash
# One run on an NVIDIA machine, under 10 minutes: tests, machine code, open questions, kernel and model times, tuning.
#
#     bench/gpu_run.sh OUT              # leaves CSV, JSON, logs and summary.md in OUT
#     bench/gpu_run.sh --dry-run OUT    # no GPU: the same stages at tiny shapes, kernels interpreted; times mean nothing
#     bench/gpu_run.sh A OUT            # or B: a run of at most 255 seconds; OUT gets stages.tsv, summary.md, results.tgz
#     bench/gpu_run.sh --rehearse A OUT # no GPU: its stages, tiny, over a driver that does nothing
#
# A says how fast it is: every kernel right once, steps of DiT-XL/2- and Flux-sized models, GEMMs, the host. B says what to
# change: tests, attention, variants, the sanitizer, W4. They need torch and Triton; models and tests also diffusers.
#
# Each stage has a time limit, is skipped with a reason where it cannot run, and does not stop the next one. What they
# leave is written as they go. The most telling stages come first: when TOTAL_SECONDS (580; 3600 for a dry run) are over,
# the running stage is ended and the rest is listed as not run.
# Exit code: 1 if a stage failed. PYTHON names the interpreter; STAGES, comma-separated, picks stages.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dry_run="" rehearse="" plan=""
if [ "${1:-}" = "--dry-run" ]; then dry_run=1; shift; fi
if [ "${1:-}" = "--rehearse" ]; then rehearse=--rehearsal; shift; fi
if [ $# -eq 2 ] && [[ "$1" =~ ^[AB]$ ]]; then plan=$1; shift; fi
if [ $# -ne 1 ] || { [ -n "$rehearse" ] && [ -z "$plan" ]; }; then
    echo "usage: bench/gpu_run.sh [--dry-run] OUT, or bench/gpu_run.sh [--rehearse] A|B OUT" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
final=$out
if [ -n "$plan" ]; then out=$(mktemp -d); fi
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/kernels:$root/converters:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
failed=0
if [ -n "$dry_run$rehearse" ]; then total=3600; elif [ -n "$plan" ]; then total=270; else total=580; fi
deadline=$((SECONDS + ${TOTAL_SECONDS:-$total}))
: > "$out/stages.tsv"

record() {
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$out/stages.tsv"; echo "$1: $2 $4"
    if [ -n "$plan" ]; then  # a run that is cut off leaves what it has
        cp "$out/stages.tsv" "$final" && tar -czf "$final/results.tgz" -C "$out" .
    fi
}

wanted() { [ -z "${STAGES:-}" ] || [[ ",$STAGES," == *",$1,"* ]]; }

# stage NAME SECONDS COMMAND...: run with a limit; stdout and stderr go to NAME.log
stage() {
    local name=$1 limit=$2 begin=$SECONDS code reason=""
    shift 2
    wanted "$name" || return 0
    if [ $((deadline - begin)) -lt 5 ]; then record "$name" "not run" 0 "no time left"; return 0; fi
    if [ $((deadline - begin)) -lt "$limit" ]; then limit=$((deadline - begin)); fi
    timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then record "$name" ok $((SECONDS - begin)) ""; return 0; fi
    failed=1
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then reason="ran past $limit seconds"; else
        reason="exit code $code: $(tail -n 1 "$out/$name.log" | tr '\t' ' ' | cut -c 1-200)"
    fi
    record "$name" failed $((SECONDS - begin)) "$reason"
}

skip() { if wanted "$1"; then record "$1" skipped 0 "$2"; fi; }

bench() { echo "$python -m ditq_bench $*"; }

cd "$root" || exit 1
if [ -z "$dry_run$rehearse" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_run: needs an NVIDIA GPU that torch can use and found none; --dry-run needs none" >&2
    exit 1
fi

run() { echo "$python -W ignore -m ditq_bench.gpu_run.$*"; }  # a warning is no error on such a machine

# limits add to at most 255 seconds
if [ -n "$plan" ]; then
    if [ -n "$rehearse" ]; then slow=40 questions="--dry-run"; export TRITON_INTERPRET=1
    else slow=1 questions=""; fi
    interpreted="env" compiled="env -u TRITON_INTERPRET"
    has_diffusers=$("$python" -c 'import importlib.util as u; print(u.find_spec("diffusers") or "")')
fi
if [ "$plan" = A ]; then
    stage small $((60 * slow)) $(run small) $questions
    if [ -n "$has_diffusers" ]; then stage models $((130 * slow)) $compiled $(run models) $rehearse --out "$out/models.jsonl"
    else skip models "no diffusers"; fi
    stage gemms $((55 * slow)) $compiled $(run gemms) $rehearse --out "$out/gemms.jsonl"
    stage host $((10 * slow)) $compiled $(run host) $rehearse --out "$out/host.jsonl"
elif [ "$plan" = B ]; then
    if [ -n "$rehearse" ]; then skip tests "no GPU"
    else stage tests 65 "$python" -m pytest -q -m gpu tests/kernels -p no:cacheprovider; fi
    stage attention $((40 * slow)) $(run questions) $questions --out "$out" --name attention --only values,sdpa --budget 35
    for question in variants:25 parts:15 split:15 rows:8 padded_rows:7; do
        name=${question%:*} limit=${question#*:}
        case "$rehearse-$name" in  # other launches than a user's: all of them through the compiler and the launcher
            --rehearsal-variants|--rehearsal-parts|--rehearsal-split) how="$compiled" what=$rehearse ;;
            *) how=$interpreted what=$questions ;;
        esac
        stage "$name" $((limit * slow)) $how $(run questions) $what --out "$out" --name "$name" --only "$name" --budget $((limit - 4))
    done
    if command -v compute-sanitizer > /dev/null; then
        stage sanitizer 50 compute-sanitizer --error-exitcode 3 "$python" -m ditq_bench.gpu_run.small
    else skip sanitizer "no compute-sanitizer in PATH"; fi
    stage w4 $((30 * slow)) $(run questions) $questions --out "$out" --name w4 --only four_bits,unpack --budget 25
fi
if [ -n "$plan" ]; then
    "$python" -m ditq_bench.gpu_run.summary "$out" && cp "$out/summary.md" "$final"
    tar -czf "$final/results.tgz" -C "$out" . && rm -r "$out"
    exit $failed
fi

if command -v nvidia-smi > /dev/null; then stage machine 20 nvidia-smi -q
else skip machine "no nvidia-smi"; fi

pack='import sys; from ditq_converters import Recipe, convert; convert("demo:digits", Recipe(method="linear", weights=sys.argv[2], modulation="w8"), out=sys.argv[1], quiet=True)'

if [ -n "$dry_run" ]; then
    stage census 300 env -u TRITON_INTERPRET $(bench census --check --kernel gemm_w8a8,gemm_w8a8+split_k --target 80 --out "$out/census.csv")
    stage tune 300 env -u TRITON_INTERPRET $(bench tune --dry-run --compile-budget 10 --target 90)
    export TRITON_INTERPRET=1
    skip tests "no GPU"
    skip sanitizer "no GPU"
    stage small 300 "$python" -m ditq_bench.gpu_run.small --dry-run
    stage questions 300 "$python" -m ditq_bench.gpu_run.questions --dry-run --out "$out"
    stage kernels_digits 300 $(bench kernels --shapes digits --budget 0 --device cpu --out "$out/kernels_digits")
    stage pack_w8 300 "$python" -c "$pack" "$out/digits-w8" w8
    stage model_w8 300 $(bench model "$out/digits-w8" --images 1 --steps 2 --budget 0 --device cpu --out "$out/model_w8")
    stage model_float 300 $(bench model demo:digits --images 1 --steps 2 --budget 0 --device cpu --out "$out/model_float")
    stage cpu 300 "$python" -m ditq_bench.cpu --shapes digits --budget 0 --rounds 0 --out "$out/cpu.csv"
else
    target=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    stage small 90 "$python" -m ditq_bench.gpu_run.small
    stage questions 170 "$python" -m ditq_bench.gpu_run.questions --out "$out" --budget 150
    stage tests 100 "$python" -m pytest -q -m gpu tests -p no:cacheprovider
    for shapes in dit-xl-256:1,16 pixart-1024:1; do
        stage "kernels_${shapes%:*}" 60 $(bench kernels --shapes "${shapes%:*}" --batch "${shapes#*:}" --budget 2 --against compiled,int_mm,int_mm+dequant --out "$out/kernels_${shapes%:*}")
    done
    for weights in w8 w4p; do
        stage "pack_$weights" 40 "$python" -c "$pack" "$out/digits-$weights" "$weights"
        stage "model_$weights" 50 $(bench model "$out/digits-$weights" --images 16 --steps 20 --modes eager,hoisted,graph --budget 8 --out "$out/model_$weights")
    done
    stage model_float 80 $(bench model demo:digits --images 16 --steps 20 --modes eager,compiled --budget 8 --out "$out/model_float")
    if command -v compute-sanitizer > /dev/null; then
        stage sanitizer 60 compute-sanitizer --error-exitcode 3 "$python" -m ditq_bench.gpu_run.small
    else skip sanitizer "no compute-sanitizer in PATH"; fi
    stage tune 90 $(bench tune --ops gemm_w8a8,gemm_w8a8_epilogue --compile-budget 30 --budget 30 --out "$out/tuned.json")
    stage cpu 90 env OMP_NUM_THREADS=2 "$python" -m ditq_bench.cpu --budget 2 --rounds 3 --out "$out/cpu.csv"
    stage census 60 $(bench census --check --target "$target" --kernel gemm_w8a8,gemm_w4a8 --out "$out/census.csv")
fi

"$python" -m ditq_bench.gpu_run.summary "$out" && echo "$out/summary.md"
exit $failed
