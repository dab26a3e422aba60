#!/bin/bash
# tools/fuzz.sh BUILD SECONDS [TARGET..]: runs each fuzz target of BUILD that long. Run by `make fuzz`.
# The corpus grows in BUILD/corpus/TARGET, seeded from the test data; a finding is left in BUILD/findings and ends with status 1.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:?usage: tools/fuzz.sh BUILD SECONDS [TARGET..]}
seconds=${2:?usage: tools/fuzz.sh BUILD SECONDS [TARGET..]}
shift 2
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  shopt -s nullglob
  for f in "$build"/tests/fuzz/*_fuzz; do targets+=("$(basename "$f" _fuzz)"); done
fi
[ ${#targets[@]} -gt 0 ] || { echo "fuzz: no target in $build/tests/fuzz" >&2; exit 1; }

# seed TARGET FOLDER BYTES: tests/fuzz/seeds/TARGET, else the files of the test data that TARGET reads. JSON longer than BYTES is left
# out; a safetensors file is cut there, since it begins with its header.
seed() {
  local files i=0 file
  if [ -d "tests/fuzz/seeds/$1" ]; then
    cp "tests/fuzz/seeds/$1"/* "$2"/
    return 0
  fi
  case $1 in
    safetensors) files=$(find tests assets -name '*.safetensors') ;;
    config) files=$(find tests assets -name '*config*.json' -size -"$3"c) ;;
    state)
      for i in 1 2 3; do
        "$build/kda" generate -m tests/golden/tiny-hybrid --prompt-ids 1,17,42 -n $i --greedy --save-state "$2/seed-$i" >/dev/null
      done
      return 0 ;;
    *) return 0 ;;
  esac
  while IFS= read -r file; do
    head -c "$3" "$file" >"$2/seed-$((++i))"
  done <<<"$files"
}

status=0
for t in "${targets[@]}"; do
  corpus=$build/corpus/$t findings=$build/findings
  mkdir -p "$corpus" "$findings"
  most=65536
  seed "$t" "$corpus" $most
  echo "fuzz: $t for $seconds s, log in $findings/$t.log"
  "$build/tests/fuzz/${t}_fuzz" "$corpus" -max_total_time="$seconds" -max_len=$most -rss_limit_mb=2048 \
    -malloc_limit_mb=1024 -timeout=10 -print_final_stats=1 -artifact_prefix="$findings/$t-" >"$findings/$t.log" 2>&1 ||
    { status=1; echo "fuzz: $t failed"; }
  tail -n 8 "$findings/$t.log"
done
if [ $status = 0 ]; then echo "fuzz: nothing found"; else echo "fuzz: findings in $build/findings" >&2; fi
exit $status
