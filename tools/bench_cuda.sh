#!/bin/bash
# tools/bench_cuda.sh [BUILD] [MODEL]: for whoever has a GPU. Runs the tests that need one, every benchmark, and, where
# Python has PyTorch and fla, the comparison with fla in the same run; appends the lines to bench/results/DEVICE.jsonl and
# renews the tables of docs/CUDA.md from them.
#
# BUILD  a build with KDA_CUDA=ON (build/cuda). MODEL: a model folder; without one, a random model of 5 B parameters is
#        written to TMPDIR (10 GB) and deleted at the end.
# KDA_BENCH_LONG=0 leaves out the prompt of a million tokens, KDA_BENCH_TESTS=0 the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda}
model=${2:-}
python=${PYTHON:-python3}
kda=$build/kda
[ -x "$kda" ] || { echo "bench_cuda: $kda is not there: cmake --preset cuda && cmake --build --preset cuda" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lines=$work/lines.jsonl
golden=${KDA_GOLDEN_DIR:-../shared/golden}/kda_op.safetensors
[ -e "$golden" ] || golden=
if "$python" tools/make_kda_cases.py "$work/cases.safetensors" 2>/dev/null; then golden=${golden:+$golden,}$work/cases.safetensors; fi

if [ "${KDA_BENCH_TESTS:-1}" != 0 ]; then
  echo "== tests" >&2
  for program in "$build"/tests/*_tests; do "$program" --gtest_filter='*Cuda*' --gtest_brief=1 >&2; done
fi
echo "== kda bench kda" >&2
"$kda" bench kda --device cuda --gates softplus,bounded ${golden:+--golden "$golden"} | tee -a "$lines"
if [ -z "$model" ]; then
  model=$work/afm-4.5b-kda-only
  "$kda" init --like afm-4.5b-kda-only -o "$model"
fi
echo "== kda bench decode, prefill" >&2
for weights in stored fp8 int8; do
  "$kda" bench decode -m "$model" --device cuda --weights $weights --batch 1,16,64 | tee -a "$lines"
done
"$kda" bench prefill -m "$model" --device cuda --tokens 2048,8192,32768 | tee -a "$lines"
[ "${KDA_BENCH_LONG:-1}" = 0 ] || "$kda" bench prefill -m "$model" --device cuda --tokens 1000000 | tee -a "$lines"
if "$python" -c 'import torch, triton, fla' 2>/dev/null; then
  echo "== fla" >&2
  "$python" bench/cuda_peer.py --ours "$lines" ${golden:+--golden "$golden"} | tee -a "$lines"
else
  echo "== fla is left out: $python has no PyTorch, Triton and fla-core" >&2
fi
device=$("$python" -c 'import json, re, sys
name = json.loads(open(sys.argv[1]).readline())["device"].lower()
print(re.sub("[^a-z0-9]+", "-", re.sub(" [0-9]+gb.*", "", name)).strip("-"))' "$lines")
cat "$lines" >> "bench/results/$device.jsonl"
"$python" -B tools/bench_table.py "bench/results/$device.jsonl" --into docs/CUDA.md
