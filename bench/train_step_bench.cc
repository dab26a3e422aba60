// One training step, part by part and op by op: a random teacher of full attention and its KDA student at a named size,
// KL to the teacher, all trainable. One JSON line for each precision; times are medians over the steps.
//   train_step_bench [SIZE=nano] [SEQUENCES=4] [TOKENS=1024] [STEPS=7] [recompute]
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <map>

#include "base/memory.h"
#include "base/rng.h"
#include "bench/kernels/device.h"
#include "checkpoint/random.h"
#include "kernels/backend.h"
#include "model/training.h"
#include "train/objective.h"
#include "train/parameters.h"
#include "train/teacher.h"

namespace kda {
namespace {

using Clock = std::chrono::steady_clock;
double ms_since(Clock::time_point t) { return std::chrono::duration<double, std::milli>(Clock::now() - t).count(); }

// Processor time of all threads: what a busy neighbour lengthens less than the wall clock.
double cpu_ms() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) * 1e3 + double(t.tv_nsec) * 1e-6;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : v[v.size() / 2];
}

// The CPU's table with a clock around each op.
std::map<std::string, double> op_ms, op_cpu_ms;
std::string part;

template <auto Member>
struct Timed;
template <class A, void (*Backend::*Member)(Context&, const A&)>
struct Timed<Member> {
  static inline std::string name;
  static void install(Backend& b, const char* op) {
    name = op;
    if (b.*Member)
      b.*Member = [](Context& ctx, const A& a) {
        const auto start = Clock::now();
        const double cpu = cpu_ms();
        (cpu_backend().*Member)(ctx, a);
        op_ms[part + "." + name] += ms_since(start);
        op_cpu_ms[part + "." + name] += cpu_ms() - cpu;
      };
  }
};

Backend timed_backend() {
  Backend b = cpu_backend();
#define KDA_TIMED(op) Timed<&Backend::op>::install(b, #op)
  KDA_TIMED(embedding);
  KDA_TIMED(rms_norm);
  KDA_TIMED(matmul);
  KDA_TIMED(add_rows);
  KDA_TIMED(add_bias);
  KDA_TIMED(relu2);
  KDA_TIMED(swiglu);
  KDA_TIMED(attention);
  KDA_TIMED(conv_silu);
  KDA_TIMED(kda_prep);
  KDA_TIMED(kda_forward);
  KDA_TIMED(kda_output);
  KDA_TIMED(matmul_dx);
  KDA_TIMED(matmul_dw);
  KDA_TIMED(rms_norm_backward);
  KDA_TIMED(add_bias_backward);
  KDA_TIMED(relu2_backward);
  KDA_TIMED(swiglu_backward);
  KDA_TIMED(embedding_backward);
  KDA_TIMED(attention_train);
  KDA_TIMED(attention_backward);
  KDA_TIMED(adamw);
  KDA_TIMED(sum_squares);
  KDA_TIMED(conv_silu_backward);
  KDA_TIMED(kda_forward_keep);
  KDA_TIMED(kda_backward);
  KDA_TIMED(kda_prep_backward);
  KDA_TIMED(kda_output_backward);
  KDA_TIMED(logits_loss);
  // rope and rope_backward share an argument type, so a member pointer of each is a Timed of its own.
  KDA_TIMED(rope);
  KDA_TIMED(rope_backward);
#undef KDA_TIMED
  return b;
}

struct Case {
  int64_t sequences, tokens, steps;
  bool recompute;
};

void measure(const Checkpoint& teacher_model, const Checkpoint& student_model, const Case& c, Precision precision) {
  static const Backend backend = timed_backend();
  ThreadPool pool;
  Context ctx;
  ctx.backend = &backend;
  ctx.pool = &pool;
  ctx.precision = precision;

  const int64_t T = c.sequences * c.tokens, V = student_model.config.vocabulary;
  const Weights teacher_weights = arrange_weights(teacher_model);
  Parameters student(ctx, student_model);
  student.set_trainable(ctx, {{.regex = "."}});
  const auto teacher = live_teacher(ctx, teacher_weights, {.logits = true, .hidden = {}, .mixers = {}}, T, c.tokens);
  Objective objective(ctx, student.weights(), {.losses = {{.function = LossFunction::kl}}, .layers = {}}, T);
  const TrainSizes sizes{.rows = T, .sequences = c.sequences, .recompute = c.recompute};
  TrainPass pass(ctx, student.weights(), sizes);

  TrainBatch batch;
  batch.start = {0};
  for (int64_t n = 0; n < c.sequences; ++n) {
    for (int64_t t = 0; t < c.tokens; ++t) {
      batch.ids.push_back(int32_t(Philox::block(1, {uint32_t(batch.ids.size()), 0, 0, 0})[0] % uint64_t(V)));
      batch.labels.push_back(t ? batch.ids.back() : -1);
    }
    batch.start.push_back(int32_t(batch.ids.size()));
  }
  std::rotate(batch.labels.begin(), batch.labels.begin() + 1, batch.labels.end());
  const Tensor d_x = host_tensor(Dtype::f32, {T, student_model.config.width});

  std::map<std::string, std::vector<double>> parts, ops, op_cpus;
  for (int64_t step = 0; step <= c.steps; ++step) {  // the first warms up
    op_ms.clear();
    op_cpu_ms.clear();
    const auto timed = [&](const char* name, const auto& f) {
      part = name;
      const auto start = Clock::now();
      f();
      if (step > 0) parts[name].push_back(ms_since(start));
    };
    const auto start = Clock::now();
    const double cpu = cpu_ms();
    const TeacherOutput* out = nullptr;
    timed("teacher", [&] { out = &teacher->run(ctx, batch); });
    View x;
    timed("forward", [&] { x = pass.forward(ctx, batch.view()); });
    timed("zero", [&] { student.zero_gradients(ctx); });
    timed("objective", [&] { objective.run(ctx, batch, *out, x, 1, d_x, &student.gradients()); });
    timed("backward", [&] { pass.backward(ctx, d_x, {}, student.gradients()); });
    double norm = 0;
    timed("norm", [&] { norm = student.gradient_norm(ctx); });
    timed("step", [&] { student.step(ctx, {.lr = 1e-5, .clip_norm = 1}, step + 1, norm); });
    if (step == 0) continue;
    parts["whole"].push_back(ms_since(start));
    parts["whole_cpu"].push_back(cpu_ms() - cpu);
    for (const auto& [name, ms] : op_ms) ops[name].push_back(ms);
    for (const auto& [name, ms] : op_cpu_ms) op_cpus[name].push_back(ms);
  }

  auto line = bench::head(pool.threads());
  line["op"] = "train_step";
  line["precision"] = precision == Precision::fast ? "fast" : "exact";
  line["layers"] = student_model.config.layers.size();
  line["width"] = student_model.config.width;
  line["sequences"] = c.sequences;
  line["tokens"] = c.tokens;
  line["recompute"] = c.recompute;
  line["tok_per_s"] = double(T) / median(parts["whole"]) * 1e3;
  const TrainBytes bytes = TrainPass::plan(ctx, student.weights(), sizes);
  line["activation_mb"] = double(bytes.activations) / 1e6;
  line["scratch_mb"] = double(bytes.scratch) / 1e6;
  line["peak_mb"] = double(peak_resident_bytes()) / 1e6;
  for (const auto& [name, ms] : parts) line["ms"][name] = median(ms);
  for (const auto& [name, ms] : ops) line["op_ms"][name] = median(ms);
  for (const auto& [name, ms] : op_cpus) line["op_cpu_ms"][name] = median(ms);
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  namespace fs = std::filesystem;
  const std::vector<std::string> args(argv + 1, argv + argc);
  const auto number = [&](size_t i, int64_t other) { return args.size() > i ? std::stoll(args[i]) : other; };
  const std::string size = args.empty() ? "nano" : args[0];
  const Case c{number(1, 4), number(2, 1024), number(3, 7), args.size() > 4 && args[4] == "recompute"};
  const fs::path folder = fs::temp_directory_path() / cat("kda-train-step-", getpid());
  ThreadPool pool;
  write_random_checkpoint(folder / "teacher", named_model(size), {}, pool);
  write_random_checkpoint(folder / "student", named_model(size, {}, "all"), {}, pool);
  const Checkpoint teacher = load_checkpoint(folder / "teacher"), student = load_checkpoint(folder / "student");
  fs::remove_all(folder);  // they stay mapped
  for (Precision p : {Precision::fast, Precision::exact}) measure(teacher, student, c, p);
  return 0;
}

}  // namespace
}  // namespace kda

int main(int argc, char** argv) { return kda::run(argc, argv); }
