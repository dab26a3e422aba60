#!/bin/bash
# tools/demo.sh PROGRAM: text from the two models in the repository. Run by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
kda=${1:-build/release/kda}

run() {
  printf '\n$ kda'
  printf ' %q' "$@"
  printf '\n'
  "$kda" "$@"
}

echo "A trained full-attention model (8 layers, 7.9 M parameters, a tokenizer of its own):"
run generate -m assets/nano-teacher -p "The ls command lists" -n 48
echo
echo "A KDA-only checkpoint (4 layers, random weights, no tokenizer: ids in, ids out):"
run generate -m tests/golden/tiny-kda --prompt-ids 1,17,42,99 -n 16
