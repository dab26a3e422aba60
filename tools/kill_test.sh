#!/bin/bash
# tools/kill_test.sh PROGRAM [KILLS [FOLDER]]: trains nano-teacher's KDA student once undisturbed, and once killed (-9) at KILLS (20)
# random moments and resumed each time; ends with status 0 when all end in the same bytes. FOLDER (a new temporary one) is left behind.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
program=$(realpath "${1:?usage: tools/kill_test.sh PROGRAM [KILLS [FOLDER]]}")
kills=${2:-20}
folder=${3:-$(mktemp -d)}
mkdir -p "$folder"
cd "$folder"

[ -d student ] || "$program" convert "$root/assets/nano-teacher" -o student --init fla 2>convert.log
cat >run.yaml <<YAML
model: student
teacher: {path: $root/assets/nano-teacher}
output_path: whole
dataset: {train_dataset: {path: $root/assets/demo/heldout.jsonl}, num_eval_samples: 2, cache: cache}
batch_size: 2
learning_rate: 1e-3
sequence_length: 64
eval: {every: 10, tokens: 512}
checkpoints: {save_steps: 3}
stages:
  - {name: align, losses: [{function: mixer_mse}], max_steps: 30}
  - {name: match, losses: [{function: kl, temperature: 1}, {function: hs_cosine}], max_steps: 30, sequence_length: 96}
YAML

rm -rf whole killed
start=$(date +%s.%N)
"$program" distill run.yaml >whole.log 2>&1
seconds=$(echo "$(date +%s.%N) $start" | awk '{print $1 - $2}')
echo "undisturbed: $seconds s"

# Each life lasts a random part of about 4/KILLS of an undisturbed run, start included. A run that ends before all kills were spent
# is compared, and another one begun.
spent=0
runs=0
: >killed.log
while [ $spent -lt "$kills" ] || [ -d killed ]; do
  "$program" distill run.yaml --set output_path=killed --resume >>killed.log 2>&1 &
  pid=$!
  if [ $spent -lt "$kills" ]; then
    sleep "$(awk -v s="$seconds" -v k="$kills" -v r="$RANDOM" 'BEGIN {print 0.05 + s * (0.02 + 4 / k) * r / 32768}')"
    if kill -9 $pid 2>/dev/null; then
      spent=$((spent + 1))
      wait $pid 2>/dev/null || true
      echo "kill $spent: last checkpoint $(ls killed 2>/dev/null | sed -n 's/^checkpoint-//p' | sort -n | tail -1)"
      continue
    fi
  fi
  wait $pid || { echo "kill_test: a resumed run failed:" >&2; tail -3 killed.log >&2; exit 1; }
  runs=$((runs + 1))
  cmp whole/final/model.safetensors killed/final/model.safetensors || { echo "kill_test: the final weights differ ($folder)" >&2; exit 1; }
  lines=$(grep -c '"kind":"train"' killed/metrics.jsonl)
  [ "$lines" = 60 ] || { echo "kill_test: $lines lines of training instead of 60" >&2; exit 1; }
  rm -rf killed
done
echo "kill_test: $spent kills in $runs runs, all end in the same bytes as the undisturbed one ($folder)"
