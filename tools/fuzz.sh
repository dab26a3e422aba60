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

# seed TARGET FOLDER BYTES: the files of the test data that TARGET reads, cut to BYTES (a safetensors file begins with its header).
seed() {
  local pattern i=0 file
  case $1 in
    safetensors) pattern='*.safetensors' ;;
    config) pattern='*config*.json' ;;
    tokenizer) pattern='*tokenizer*.json' ;;
    state)
      for i in 1 2 3; do
        "$build/kda" generate -m tests/golden/tiny-hybrid --prompt-ids 1,17,42 -n $i --greedy --save-state "$2/seed-$i" >/dev/null
      done
      return 0 ;;
    *) return 0 ;;
  esac
  while IFS= read -r file; do
    head -c "$3" "$file" >"$2/seed-$((++i))"
  done < <(find tests/golden tests/data assets -type f -name "$pattern" | sort)
}

status=0
for t in "${targets[@]}"; do
  corpus=$build/corpus/$t findings=$build/findings
  mkdir -p "$corpus" "$findings"
  most=65536
  seed "$t" "$corpus" $most
  echo "fuzz: $t for $seconds s"
  "$build/tests/fuzz/${t}_fuzz" "$corpus" -max_total_time="$seconds" -max_len=$most -rss_limit_mb=2048 \
    -malloc_limit_mb=1024 -timeout=10 -print_final_stats=1 -verbosity=1 -artifact_prefix="$findings/$t-" || status=1
done
[ $status = 0 ] && echo "fuzz: nothing found" || echo "fuzz: findings in $build/findings" >&2
exit $status
