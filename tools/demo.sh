#!/bin/bash
# tools/demo.sh PROGRAM: a trained full-attention model becomes a KDA model, on this machine, in a few minutes.
# Run by `make demo`. Everything it makes lies in build/demo and is made anew each time.
set -euo pipefail
cd "$(dirname "$0")/.."
kda=${1:-build/release/kda}
out=build/demo
data=assets/demo
started=$SECONDS

say() {
  local spent=$((SECONDS - started))
  printf '\n== %s  [%d:%02d]\n' "$1" $((spent / 60)) $((spent % 60))
}
run() {
  local word line='$ kda'
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./,-]*) line+=" ${word@Q}" ;; *) line+=" $word" ;; esac
  done
  printf '%s\n' "$line"
  "$kda" "$@"
}

rm -rf "$out"
mkdir -p "$out"
xz -dc $data/train.jsonl.xz > $out/train.jsonl

say "The teacher: full attention, 8 layers, 7.9 M parameters"
run generate -m assets/nano-teacher --stop Question: \
  -p $'Question: Rosa has 34 shells and gives away 9. How many shells are left?\nAnswer:'
run generate -m assets/nano-teacher -n 40 -p "To list the files in a directory, use"

say "The student: the same model with every attention layer replaced by Kimi Delta Attention"
run convert assets/nano-teacher -o $out/student --kda all --init calibrated --data $out/train.jsonl

say "Training it on $(du -h $out/train.jsonl | cut -f1) of text: first each layer by itself, then the whole model"
run distill $data/run.yaml
run report $out/run -o $out/report.html --title "kda demo"

say "What came of it"
trained=()
[ -e assets/nano-student/config.json ] && trained=(--trained assets/nano-student)
run demo -m assets/nano-teacher --before $out/student --after $out/run/final "${trained[@]}" \
  --needles $data/needles.jsonl --arithmetic $data/arithmetic.jsonl --text $data/heldout.jsonl \
  --report $out/report.html --json $out/demo.json
say "done"
