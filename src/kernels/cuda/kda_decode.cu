// kernels/cuda/kda_decode.cu — the body of kda_decode.h; the kernels are in kda_decode_kernel.cuh.
#include "kernels/kda_decode.h"

#include "kernels/cuda/chain.h"
#include "kernels/cuda/kda_decode_launch.cuh"
#include "kernels/cuda/kda_decode_many.h"
#include "kernels/cuda/ops.h"

namespace kda::cuda {

void kda_decode(Context& ctx, const KdaDecode& a) {
  const int64_t H = a.A_log.dim(0), V = a.o_norm.dim(0), K = a.dt_bias.dim(0) / H;
  const Device& device = device_of(ctx);
  const KdaDecodeArgs args{.q = bf16_of(a.q),
                           .k = bf16_of(a.k),
                           .v = bf16_of(a.v),
                           .f = bf16_of(a.f),
                           .b = bf16_of(a.b),
                           .g = bf16_of(a.g),
                           .q_conv = a.q_conv.as<float>(),
                           .k_conv = a.k_conv.as<float>(),
                           .v_conv = a.v_conv.as<float>(),
                           .A_log = a.A_log.as<float>(),
                           .dt_bias = a.dt_bias.as<float>(),
                           .g_bias = a.g_bias.as<float>(),
                           .o_norm = a.o_norm.as<float>(),
                           .window = bf16_of(a.window),
                           .state = a.state.as<float>(),
                           .in = a.slots.in,
                           .out = a.slots.out,
                           .y = bf16_of(a.y),
                           .slots = a.state.dim(0),
                           .N = int(a.q.dim(0)),
                           .H = int(H),
                           .K = int(K),
                           .V = int(V),
                           .gate = a.gate,
                           .eps = a.eps};
  if (kda_decode_many_takes(ctx, args)) return kda_decode_many(ctx, args);
  if (!chain_kda_decode(ctx, args)) launch_kda_decode(stream_of(ctx), device.arch >= 90, device.sms, args);
}

size_t kda_decode_workspace(const Context&, int64_t, int64_t, int64_t, int64_t) { return 0; }

}  // namespace kda::cuda
