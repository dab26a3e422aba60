// cli/bench_kda.cc — kda bench kda: the KDA ops at a layer's size, from what the convolutions gave to o and the state,
// and the fused decode step, beside what the device's memory allows. Each result is first held against the recurrence
// in double; a wrong one is not timed.
#include <algorithm>
#include <iostream>

#include "cli/bench.h"
#include "cli/bench_kda_case.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "kernels/kda.h"
#include "kernels/kda_decode.h"
#include "runtime/engine.h"

namespace kda::cli {

namespace {

using nlohmann::json;

struct Options {
  std::string device = "auto";
  std::vector<std::string> golden;
  int threads = 0;
  int64_t H = 20, K = 128, V = 128, rounds = 30;
  std::vector<std::string> sizes{"1x8192", "4x8192", "1x32768"};
  std::vector<std::string> gates{"softplus"};
  std::vector<int64_t> batches{1, 8, 64, 256};
};

// Relative L2, above which a result is taken for wrong: bf16 products on the GPU, fp32 sums on the CPU.
double allowed(const Context& ctx) { return on_cuda(ctx) ? 6e-3 : 1e-4; }

KdaGateParams gate_named(const std::string& name) {
  return {.kind = name == "bounded" ? KdaGate::bounded : KdaGate::softplus};
}

json sizes_of(json line, const KdaSizes& s) {
  line.update({{"H", s.H}, {"K", s.K}, {"V", s.V}, {"N", s.N}, {"T_per_sequence", s.T}});
  return line;
}

// Throws where a result is further from the recurrence than it may be; the line tells how far it is.
void put_errors(const Context& ctx, json& line, const KdaResult& got, const KdaResult& want) {
  const double o = relative_distance(got.o, want.o), state = relative_distance(got.state, want.state);
  line["error_o"] = o, line["error_state"] = state;
  KDA_CHECK(o <= allowed(ctx) && state <= allowed(ctx), "kda bench: ", line["op"].get<std::string>(), " is ", o,
            " (o) and ", state, " (state) away from the recurrence in double, not timed");
}

void check_golden(Context& ctx, const std::string& path) {
  for (const KdaCase& c : golden_kda_cases(path, ctx.backend->activation)) {
    json line = sizes_of(bench_line(ctx, "kda_error"), c.size);
    line.update(
        {{"form", "chunk"}, {"case", c.name}, {"gate", c.gate.kind == KdaGate::bounded ? "bounded" : "softplus"}});
    const KdaResult got = run_kda_prefill(ctx, c), want = kda_in_double(c);
    line["error_o"] = relative_distance(got.o, want.o), line["error_state"] = relative_distance(got.state, want.state);
    print_line(line);
  }
}

// What the timed forward pass has in the backend's memory. kda_prefill may overwrite its inputs, so each round starts
// with fresh ones.
void bench_forward(Context& ctx, const Options& o, const std::string& gate, int64_t N, int64_t T, double read_rate) {
  const KdaSizes s{N, T, o.H, o.K, o.V};
  json line = sizes_of(bench_line(ctx, "kda_forward"), s);
  line["gate"] = gate;
  {
    const KdaCase c =
        random_kda_case("check", {N == 1 ? 1 : 2, 300, 2, o.K, o.V}, gate_named(gate), ctx.backend->activation);
    put_errors(ctx, line, run_kda_prefill(ctx, c), kda_in_double(c));
  }
  const Dtype act = ctx.backend->activation;
  const Shape keys{N * T, o.H, o.K}, values{N * T, o.H, o.V};
  struct InOut {
    Tensor kept, used;
  };
  std::vector<InOut> x;
  for (uint32_t i = 0; i < 3; ++i) x.push_back({normal_values(ctx, act, keys, 20 + i), ctx.backend->alloc(act, keys)});
  x.push_back({normal_values(ctx, act, {N * T, o.H}, 23), ctx.backend->alloc(act, {N * T, o.H})});
  const Tensor v = normal_values(ctx, act, values, 24), out = ctx.backend->alloc(act, values),
               S = ctx.backend->alloc(Dtype::f32, {N, o.H, o.V, o.K}),
               bias = ctx.backend->alloc(Dtype::f32, {o.H * o.K}),
               A = to_backend(ctx, Dtype::f32, {o.H}, random_kda_case("A", {1, 1, o.H, 1, 1}, {}, act).A_log);
  std::vector<int32_t> start, in(size_t(N), -1), slots;
  for (int64_t n = 0; n <= N; ++n) start.push_back(int32_t(n * T));
  for (int64_t n = 0; n < N; ++n) slots.push_back(int32_t(n));
  const auto device = [&](const std::vector<int32_t>& from) {
    const Tensor t = ctx.backend->alloc(Dtype::i32, {int64_t(from.size())});
    ctx.backend->copy(ctx, t.v.data, from.data(), t.v.bytes());
    return t;
  };
  const Tensor d_start = device(start), d_in = device(in), d_out = device(slots);
  ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(kda_prefill_workspace_bytes(ctx, N * T, N, o.H, o.K, o.V))});
  const auto fresh = [&] {
    for (const InOut& t : x) ctx.backend->copy(ctx, t.used.v.data, t.kept.v.data, t.used.v.bytes());
  };
  const auto ms = time_ms(ctx, o.rounds, fresh, [&] {
    kda_prefill(ctx, {.q = x[0].used,
                      .k = x[1].used,
                      .v = v,
                      .f = x[2].used,
                      .b = x[3].used,
                      .A_log = A,
                      .dt_bias = bias,
                      .gate = gate_named(gate),
                      .state = S,
                      .slots = {d_in.v.as<int32_t>(), d_out.v.as<int32_t>()},
                      .packing = {start, d_start.v.as<int32_t>()},
                      .o = out});
  });
  put_spread(line, ms);
  const double bytes = double(3 * x[0].used.v.bytes() + x[3].used.v.bytes() + 2 * v.v.bytes());
  line["us_per_token"] = percentile(ms, .5) * 1e3 / double(N * T);
  line["limit"] = "device memory: q, k, v, gate, beta and o once";
  line["limit_ms"] = bytes / read_rate * 1e3;
  line["share"] = bytes / read_rate * 1e3 / percentile(ms, .5);
  print_line(line);
}

// A step of 20 layers, each with a state of its own, recorded where the backend records; ms are of one layer.
void bench_decode(Context& ctx, const Options& o, int64_t N, double copy_rate) {
  constexpr int64_t kLayers = 20;
  const Dtype act = ctx.backend->activation;
  const KdaSizes s{N, 1, o.H, o.K, o.V};
  json line = sizes_of(bench_line(ctx, "kda_decode"), s);
  line["form"] = "fused", line["layers"] = kLayers;
  const auto args = [&](const KdaStep& x, std::vector<Tensor>& keep) {
    const auto [n, t, H, K, V] = x.size;
    const int64_t HK = H * K, HV = H * V, C = 2 * HK + HV;
    std::vector<int32_t> slots;
    for (int64_t i = 0; i < n; ++i) slots.push_back(int32_t(i));
    const auto put = [&](Dtype dtype, Shape shape, std::vector<float> from) {
      keep.push_back(to_backend(ctx, dtype, shape, from));
      return keep.back().v;
    };
    const auto taps = [&](int64_t from, int64_t to) {
      return std::vector<float>(x.conv.begin() + from * 4, x.conv.begin() + to * 4);
    };
    keep.push_back(ctx.backend->alloc(Dtype::i32, {n}));
    const int32_t* slot = keep.back().v.as<int32_t>();
    ctx.backend->copy(ctx, keep.back().v.data, slots.data(), slots.size() * 4);
    const KdaCase& c = x.inputs;
    return KdaDecode{.q = put(act, {n, HK}, c.q),
                     .k = put(act, {n, HK}, c.k),
                     .v = put(act, {n, HV}, c.v),
                     .f = put(act, {n, HK}, c.f),
                     .b = put(act, {n, H}, c.b),
                     .g = put(act, {n, HV}, x.g),
                     .q_conv = put(Dtype::f32, {HK, 4}, taps(0, HK)),
                     .k_conv = put(Dtype::f32, {HK, 4}, taps(HK, 2 * HK)),
                     .v_conv = put(Dtype::f32, {HV, 4}, taps(2 * HK, C)),
                     .A_log = put(Dtype::f32, {H}, c.A_log),
                     .dt_bias = put(Dtype::f32, {HK}, c.dt_bias),
                     .g_bias = put(Dtype::f32, {HV}, x.g_bias),
                     .o_norm = put(Dtype::f32, {V}, x.o_norm),
                     .gate = {},
                     .eps = 1e-5f,
                     .window = put(act, {n, 3, C}, x.window),
                     .state = put(Dtype::f32, {n, H, V, K}, c.state),
                     .slots = {slot, slot},
                     .y = put(act, {n, HV}, std::vector<float>(size_t(n * HV)))};
  };
  ctx.workspace =
      ctx.backend->alloc(Dtype::u8, {int64_t(kda_decode_workspace_bytes(ctx, std::max<int64_t>(N, 3), o.H, o.K, o.V))});
  {
    const KdaStep x = random_kda_step({std::min<int64_t>(N, 3), 1, o.H, o.K, o.V}, act);
    std::vector<Tensor> keep;
    const KdaDecode a = args(x, keep);
    kda_decode(ctx, a);
    put_errors(ctx, line, {from_backend(ctx, a.y), from_backend(ctx, a.state)}, kda_step_in_double(x));
  }
  std::vector<Tensor> keep;
  KdaDecode a = args(random_kda_step(s, act), keep);
  std::vector<Tensor> states, windows;
  for (int64_t l = 0; l < kLayers; ++l) {
    states.push_back(ctx.backend->alloc(Dtype::f32, a.state.shape));
    windows.push_back(ctx.backend->alloc(act, a.window.shape));
    ctx.backend->copy(ctx, states.back().v.data, a.state.data, a.state.bytes());
    ctx.backend->copy(ctx, windows.back().v.data, a.window.data, a.window.bytes());
  }
  const auto step = [&] {
    for (int64_t l = 0; l < kLayers; ++l) {
      a.state = states[size_t(l)], a.window = windows[size_t(l)];
      kda_decode(ctx, a);
    }
  };
  step();  // whatever is loaded at first use
  const auto recorded = ctx.backend->record ? ctx.backend->record(ctx, step) : nullptr;
  auto ms = time_ms(
      ctx, o.rounds, [] {}, [&] { recorded ? recorded->run(ctx) : step(); });
  for (double& x : ms) x /= kLayers;
  put_spread(line, ms);
  const double bytes = 2.0 * double(a.state.bytes());
  line["state_tb_s"] = bytes / percentile(ms, .5) / 1e9;
  line["limit"] = "copying device memory";
  line["limit_bytes_per_s"] = copy_rate;
  line["share"] = bytes / percentile(ms, .5) * 1e3 / copy_rate;
  print_line(line);
}

void run(const Options& o) {
  ThreadPool pool(o.threads);
  Context ctx;
  ctx.pool = &pool;
  const Backend* cuda = cuda_backend();
  const std::string why = cuda ? cuda->unavailable() : "this program was built without CUDA";
  KDA_CHECK(o.device != "cuda" || why.empty(), "--device cuda: ", why);
  ctx.backend = o.device != "cpu" && why.empty() ? cuda : &cpu_backend();
  ctx.backend->open(ctx);
  double read_rate, copy_rate;
  if (on_cuda(ctx)) {
    read_rate = probe_device_read_bytes_per_s(ctx), copy_rate = probe_device_copy_bytes_per_s(ctx);
    json line = bench_line(ctx, "limits");
    line.update({{"read_bytes_per_s", read_rate},
                 {"copy_bytes_per_s", copy_rate},
                 {"gemm_flops_per_s", probe_matmul_flops_per_s(ctx)}});
    print_line(line);
  } else {
    read_rate = copy_rate = probe_dram_read_bytes_per_s(pool);
  }
  for (const std::string& path : o.golden) check_golden(ctx, path);
  for (const std::string& gate : o.gates)
    for (const std::string& size : o.sizes) {
      const size_t x = size.find('x');
      bench_forward(ctx, o, gate, std::stoll(size.substr(0, x)), std::stoll(size.substr(x + 1)), read_rate);
    }
  for (int64_t N : o.batches) bench_decode(ctx, o, N, copy_rate);
}

}  // namespace

void add_bench_kda(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  CLI::App* c =
      bench.add_subcommand("kda", "a KDA layer's recurrence: prompts, and the fused step of generated tokens");
  c->add_option("--device", o->device, "where to run")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  c->add_option("-t,--threads", o->threads, "threads; 0: one per core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  c->add_option("--heads", o->H, "heads")->check(whole_number(1))->capture_default_str();
  c->add_option("--key-dim", o->K, "key width")->check(whole_number(1))->capture_default_str();
  c->add_option("--value-dim", o->V, "value width")->check(whole_number(1))->capture_default_str();
  const CLI::Validator size(
      [](std::string& s) {
        const size_t x = s.find('x');
        const auto number = [](const std::string& t) {
          return !t.empty() && t.size() < 9 && t.find_first_not_of("0123456789") == std::string::npos &&
                 std::stoll(t) > 0;
        };
        return x != std::string::npos && number(s.substr(0, x)) && number(s.substr(x + 1))
                   ? std::string()
                   : "needs SEQUENCESxTOKENS, such as 4x8192, got " + s;
      },
      "NxT");
  c->add_option("--sizes", o->sizes, "prompts: sequences x tokens of each")
      ->delimiter(',')
      ->check(size)
      ->capture_default_str();
  c->add_option("--gates", o->gates, "softplus, bounded")
      ->delimiter(',')
      ->check(CLI::IsMember({"softplus", "bounded"}))
      ->capture_default_str();
  c->add_option("--batches", o->batches, "sequences of a decode step")
      ->delimiter(',')
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--rounds", o->rounds, "timings of each")->check(whole_number(1))->capture_default_str();
  c->add_option("--golden", o->golden, "files of cases (kda_op.safetensors): prints the error on each")->delimiter(',');
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
