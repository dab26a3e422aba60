#!/bin/bash
# tools/bench.sh BUILD: runs every benchmark of BUILD, one after the other. Run by `make bench`.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/release}
shopt -s nullglob
programs=("$build"/bench/*_bench)
[ ${#programs[@]} -gt 0 ] || { echo "bench: no benchmark in $build/bench" >&2; exit 1; }
for program in "${programs[@]}"; do
  echo "== $(basename "$program")" >&2
  "$program"
done
