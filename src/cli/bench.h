// cli/bench.h — what the benchmarks of `kda bench` share. Heavy (JSON): for bench*.cc only.
#pragma once
#include <CLI/CLI.hpp>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/probe.h"
#include "model/weights.h"

namespace kda::cli {

using BenchClock = std::chrono::steady_clock;
double ms_since(BenchClock::time_point);

double percentile(std::vector<double>, double p);
// "ms_p10", "ms_p50", "ms_p90"
void put_spread(nlohmann::json& line, const std::vector<double>& ms);

// The device's name as its driver has it, the CPU's as the kernel has it.
std::string device_name(const Context&);
bool on_cuda(const Context&);
// What every line begins with: op, device, commit.
nlohmann::json bench_line(const Context&, const char* op);
// A line to standard output, at once.
void print_line(const nlohmann::json&);

// Ids below `vocabulary`, the same on every run.
std::vector<int32_t> random_ids(int64_t n, int64_t vocabulary, uint32_t seed = 0);

// The layers' matrices: what a forward pass multiplies by, and how often.
std::vector<GemmShape> layer_products(const Weights&);

// Floating-point operations a second of the backend's own product, 8192 x 8192 x 8192 on CUDA.
double probe_matmul_flops_per_s(Context&);

// Milliseconds of `work`, several times: by the device's clock, or by the host's on the CPU. `before` runs ahead of
// each and is not counted.
std::vector<double> time_ms(Context&, int64_t rounds, const std::function<void()>& before,
                            const std::function<void()>& work);

void add_bench_kda(CLI::App& bench);
void add_bench_decode(CLI::App& bench);
void add_bench_prefill(CLI::App& bench);

}  // namespace kda::cli
