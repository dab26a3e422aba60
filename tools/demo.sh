#!/bin/bash
# tools/demo.sh PROGRAM: text from the two models in the repository. Run by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
kda=${1:-build/release/kda}

run() {
  local word line='$ kda'
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./,-]*) line+=" ${word@Q}" ;; *) line+=" $word" ;; esac
  done
  printf '\n%s\n' "$line"
  "$kda" "$@"
}

echo "A trained model with full attention (8 layers, 7.9 M parameters): arithmetic, then free text."
run generate -m assets/nano-teacher --stop Question: \
  -p $'Question: Rosa has 34 shells and gives away 9. How many shells are left?\nAnswer:'
run generate -m assets/nano-teacher -n 40 -p "To list the files in a directory, use"
echo
echo "A checkpoint with KDA layers only (4 layers, random weights, no tokenizer: ids in, ids out)."
run generate -m tests/golden/tiny-kda --prompt-ids 1,17,42,99 -n 16
