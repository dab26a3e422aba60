#!/bin/bash
# Installs the Debian packages that building and testing need, if any is missing. Says nothing when all are there.
#   tools/setup.sh          what the library, the program and the tests need
#   tools/setup.sh fuzz     and clang with its fuzzer
#   tools/setup.sh cuda     and the C++ headers of the cuDNN front end, from PyPI, into .cache/ (the CUDA toolkit itself is
#                           not installed from here)
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
cuda=0
for want in "$@"; do
  case $want in
    fuzz) packages+=(clang libclang-rt-dev libomp-dev) ;;
    cuda)
      cuda=1
      python3 -m pip --version >/dev/null 2>&1 || packages+=(python3-pip)
      ;;
    format) packages+=(clang-format) ;;
    --list) list=1 ;;
    *) echo "setup: unknown argument '$want' (known: fuzz, cuda, format, --list)" >&2; exit 2 ;;
  esac
done
if [ $list = 1 ]; then
  printf '%s\n' "${packages[@]}"
  exit 0
fi

# A wheel of headers; the Python code beside them is left out. The version is fixed, so every build has the same.
fetch_cudnn_frontend() {
  local version=1.32.0 into wheel
  into="$(cd "$(dirname "$0")/.." && pwd)/.cache/cudnn-frontend-$version"
  [ -e "$into/include/cudnn_frontend.h" ] && return
  echo "setup: fetching the headers of nvidia-cudnn-frontend $version"
  wheel=$(mktemp -d)
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --platform manylinux_2_28_x86_64 -d "$wheel" "nvidia-cudnn-frontend==$version"
  rm -rf "$into.new"
  python3 - "$wheel"/*.whl "$into.new" <<'PYTHON'
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
wheel.extractall(sys.argv[2], [n for n in wheel.namelist() if n.startswith("include/") or "LICENSE" in n])
PYTHON
  rm -rf "$into" "$wheel"
  mv "$into.new" "$into"
}

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup: this system has no apt-get. Install what these Debian packages hold by its own means, then give make" >&2
  echo "SETUP=: so that it does not look for them:  ${packages[*]}" >&2
  exit 1
fi

missing=()
for p in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} = 0 ]; then
  [ $cuda = 0 ] || fetch_cudnn_frontend
  exit 0
fi

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
[ $cuda = 0 ] || fetch_cudnn_frontend
