#!/bin/bash
# Installs the Debian packages that building and testing need, if any is missing. Says nothing when all are there.
#   tools/setup.sh          what the library, the program and the tests need
#   tools/setup.sh fuzz     and clang with its fuzzer
#   tools/setup.sh format   and clang-format
#   tools/setup.sh --list   prints the packages and installs nothing
set -euo pipefail

packages=(
  build-essential cmake ninja-build pkg-config
  libdnnl-dev           # matrix products on the CPU
  libhwy-dev            # SIMD with dispatch at run time
  libpcre2-dev          # the tokenizer's regular expressions
  libutf8proc-dev       # Unicode normal forms
  libsimdjson-dev       # large JSON files
  nlohmann-json3-dev    # JSON everywhere else
  libyaml-cpp-dev       # run files
  libcli11-dev
  libgtest-dev python3  # the tests
  xz-utils              # packed test data
)
list=0
for want in "$@"; do
  case $want in
    fuzz) packages+=(clang libclang-rt-dev libomp-dev) ;;
    format) packages+=(clang-format) ;;
    --list) list=1 ;;
    *) echo "setup: unknown argument '$want' (known: fuzz, format, --list)" >&2; exit 2 ;;
  esac
done
if [ $list = 1 ]; then
  printf '%s\n' "${packages[@]}"
  exit 0
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup: this system has no apt-get. Install what these Debian packages hold by its own means, then give make" >&2
  echo "SETUP=: so that it does not look for them:  ${packages[*]}" >&2
  exit 1
fi

missing=()
for p in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} = 0 ] && exit 0

root=()
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: these packages are missing, and installing them needs root or sudo: ${missing[*]}" >&2
    exit 1
  fi
  root=(sudo)
fi
echo "setup: installing ${missing[*]}"
install=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}")
# A fresh machine has no package lists, an idle one has old ones, which name files that are gone.
update=("${root[@]}" apt-get update -q)
fresh=0
for p in "${missing[@]}"; do
  apt-cache show "$p" >/dev/null 2>&1 && continue
  "${update[@]}" </dev/null
  fresh=1
  break
done
if ! "${install[@]}" </dev/null; then
  [ $fresh = 0 ] || exit 1
  echo "setup: that failed; fetching the package lists and trying again"
  "${update[@]}" </dev/null
  "${install[@]}" </dev/null
fi
