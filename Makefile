# A thin front over the CMake presets: each target says what it runs. Results are in build/PRESET.
#   make            build the release program (build/release/kda)
#   make demo       build, then turn the bundled model into a KDA model, train it and compare: some five minutes
#   make test       build, then every test;    make asan, make tsan: the same under sanitizers
#   make cuda       build with the CUDA backend (needs nvcc; build/cuda/kda); TARGETS=".." builds only those
#   make bench      build, then every benchmark
#   make bench-cuda build with CUDA, then tests and benchmarks on the GPU (MODEL=folder; tools/bench_cuda.sh)
#   make fuzz       run each fuzz target for SECONDS (60)
#   make install    install under PREFIX (/usr/local)
#   make format     clang-format on every source file
# JOBS=N sets how many compile jobs and tests run at once (default: the cores, at most 2: a job may need 1 GB).
# SETUP=: skips the check for Debian packages, on a system that has the libraries by other means.

JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -gt 2 ] && n=2; echo $$n)
SETUP ?= tools/setup.sh
PREFIX ?= /usr/local
SECONDS ?= 60

ifeq ($(origin CMAKE_CXX_COMPILER_LAUNCHER),undefined)
  ifneq ($(shell command -v ccache 2>/dev/null),)
    export CMAKE_CXX_COMPILER_LAUNCHER := ccache
    export CMAKE_CUDA_COMPILER_LAUNCHER := ccache
  endif
endif

all: release

setup:
	@$(SETUP)

release debug: setup
	cmake --preset $@
	cmake --build --preset $@ -j $(JOBS)

cuda: setup
	cmake --preset cuda
	cmake --build --preset cuda -j $(JOBS) $(if $(TARGETS),--target $(TARGETS))

bench-cuda: cuda
	tools/bench_cuda.sh build/cuda $(MODEL)

demo: release
	tools/demo.sh build/release/kda

test: release
	ctest --preset release -j $(JOBS)

asan tsan: setup
	cmake --preset $@
	cmake --build --preset $@ -j $(JOBS)
	ctest --preset $@ -j $(JOBS)

bench: release
	tools/bench.sh build/release

fuzz:
	@$(SETUP) fuzz
	cmake --preset fuzz
	cmake --build --preset fuzz -j $(JOBS)
	tools/fuzz.sh build/fuzz $(SECONDS)

install: release
	cmake --install build/release --prefix $(PREFIX)

format:
	@$(SETUP) format
	find src tests bench examples -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format -i

clean:
	rm -rf build

.PHONY: all setup release debug cuda demo test asan tsan bench bench-cuda fuzz install format clean
