#!/usr/bin/env python3
"""Kimi Delta Attention in fla (flash-linear-attention) on a GPU, to compare `kda bench kda --device cuda` with.

By hand, where PyTorch, Triton and fla-core are installed; prints JSON lines, progress goes to stderr.

    python bench/cuda_peer.py                           probes, forward, errors, decode
    python bench/cuda_peer.py --golden kda_op.safetensors,cases.safetensors   (tools/make_kda_cases.py)
    python bench/cuda_peer.py --ours lines.jsonl        lines of `kda bench kda` of the same machine: prints pairs too
    python bench/cuda_peer.py --parts probe,decode --seconds 60

Errors are relative L2 distances to a recurrence in float64 on the same inputs, which were rounded to bf16 first. Times
are device time by events around one call, and around the replay of a CUDA graph of it, which has no Python in it.
"""
import argparse
import json
import math
import statistics
import struct
import sys
import time
from pathlib import Path

START = time.time()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

DEVICE = "cuda"
HEADS, WIDTH = 20, 128  # of the 5 B model


def log(*words):
    print(f"[{time.time() - START:6.1f} s]", *words, file=sys.stderr, flush=True)


LINES = []


def emit(**line):
    line = {"by": "peer", "device": torch.cuda.get_device_name(), **line}
    LINES.append(line)
    print(json.dumps(line), flush=True)


def percentiles(samples):
    s = sorted(samples)
    at = lambda p: round(s[min(len(s) - 1, int(p * len(s)))], 6)
    return {"ms_p10": at(0.1), "ms_p50": at(0.5), "ms_p90": at(0.9)}


def time_ms(f, seconds=0.5, most=50):
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    samples, begin = [], time.time()
    while len(samples) < 5 or (len(samples) < most and time.time() - begin < seconds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        b.synchronize()
        samples.append(a.elapsed_time(b))
    return samples


def graph_of(f):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = f()
    graph.keep = keep
    return graph


def probe():
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    t = time_ms(lambda: a @ b)
    emit(op="gemm", M=n, N=n, K=n, dtype="bf16", tflops=round(2 * n**3 / statistics.median(t) / 1e9, 1), **percentiles(t))
    x = torch.empty(1 << 30, dtype=torch.float32, device=DEVICE).normal_()
    y = torch.empty_like(x)
    t = time_ms(lambda: y.copy_(x))
    emit(op="copy", bytes=2 * x.nbytes, gb_s=round(2 * x.nbytes / statistics.median(t) / 1e6, 1), **percentiles(t))
    t = time_ms(lambda: torch.sum(x))
    emit(op="read", bytes=x.nbytes, gb_s=round(x.nbytes / statistics.median(t) / 1e6, 1), **percentiles(t))


def random_case(B, T, H, K, V, lower=None, seed=0):
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    n = lambda *s: torch.randn(*s, generator=g, device=DEVICE).bfloat16()
    a = torch.rand(H, generator=g, device=DEVICE) * 15 + 1
    return dict(q=n(B, T, H, K), k=n(B, T, H, K), v=n(B, T, H, V), g=n(B, T, H, K), beta=n(B, T, H), A_log=a.log(),
                dt_bias=torch.zeros(H * K, device=DEVICE), lower=lower, neg=False, h0=None)


def chunk(c):
    from fla.ops.kda import chunk_kda
    with torch.no_grad():
        return chunk_kda(
            q=c["q"], k=c["k"], v=c["v"], g=c["g"], beta=c["beta"], A_log=c["A_log"], dt_bias=c["dt_bias"],
            initial_state=c["h0"], output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=c["neg"], safe_gate=c["lower"] is not None,
            lower_bound=c["lower"], state_v_first=True)


def recurrent(c):
    from fla.ops.kda import fused_recurrent_kda
    with torch.no_grad():
        return fused_recurrent_kda(
            q=c["q"], k=c["k"], v=c["v"], g=c["g"], beta=c["beta"], A_log=c["A_log"], dt_bias=c["dt_bias"],
            initial_state=c["h0"], output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=c["neg"], lower_bound=c["lower"], state_v_first=True)


def reference(c):
    """The recurrence, token by token, in float64 on the rounded inputs: o [B,T,H,V] and the state [B,H,V,K]."""
    d = lambda x: x.double()
    unit = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    q, k, v, z = unit(d(c["q"])), unit(d(c["k"])), d(c["v"]), d(c["g"])
    B, T, H, K = q.shape
    z = z + d(c["dt_bias"]).view(H, K)
    rate = d(c["A_log"]).exp()[:, None]
    g = c["lower"] * torch.sigmoid(rate * z) if c["lower"] is not None else -rate * F.softplus(z, threshold=700)
    beta = torch.sigmoid(d(c["beta"])) * (2 if c["neg"] else 1)
    decay = g.exp()
    S = torch.zeros(B, H, v.shape[-1], K, dtype=torch.float64, device=DEVICE) if c["h0"] is None else d(c["h0"])
    o = torch.empty_like(v)
    for t in range(T):
        S = S * decay[:, t, :, None, :]
        u = beta[:, t, :, None] * (v[:, t] - (S @ k[:, t, :, :, None])[..., 0])
        S = S + u[..., None] * k[:, t, :, None, :]
        o[:, t] = (S @ q[:, t, :, :, None])[..., 0]
    return o * K ** -0.5, S


def distance(x, ref):
    x = x.double()
    if not torch.isfinite(x).all():
        return None
    return float((x - ref).norm() / ref.norm().clamp_min(1e-300))


def read_safetensors(path):
    data = Path(path).read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    head, out = json.loads(data[8:8 + n]), {}
    meta = head.pop("__metadata__", {})
    for name, t in head.items():
        a, e = t["data_offsets"]
        assert t["dtype"] == "F32", name
        out[name] = torch.frombuffer(bytearray(data[8 + n + a:8 + n + e]), dtype=torch.float32).reshape(t["shape"])
    return out, meta


def golden_case(tensors, case):
    """A case of kda_op, its heads repeated to HEADS, so that all cases of a width share what Triton tuned."""
    i, H = case["index"], case["H"]
    repeat = (HEADS + H - 1) // H
    x = {name: tensors[f"{i}.{name}"] for name in ("q", "k", "v", "g_raw", "beta_raw", "A_log", "dt_bias", "h0")}
    heads = lambda t, axis: torch.cat([t] * repeat, axis).narrow(axis, 0, HEADS).contiguous().to(DEVICE)
    bf16 = lambda t: heads(t, 2).bfloat16()
    return dict(q=bf16(x["q"]), k=bf16(x["k"]), v=bf16(x["v"]), g=bf16(x["g_raw"]), beta=bf16(x["beta_raw"]),
                A_log=heads(x["A_log"], 0), dt_bias=heads(x["dt_bias"].view(H, -1), 0).view(-1),
                h0=heads(x["h0"], 1).transpose(-1, -2).contiguous(), lower=case.get("lower"),
                neg=bool(case.get("neg"))), H


def first_heads(c, o, state, H):
    return o[:, :, :H], state[:, :H]


def tuners():
    import gc
    from triton.runtime.autotuner import Autotuner
    return [x for x in gc.get_objects() if isinstance(x, Autotuner)]


def untuned():
    """From here on each kernel takes the first of its configurations: errors need no tuning, which costs minutes."""
    import fla.ops.kda  # noqa: F401
    for t in tuners():
        t.configs, t.cache = t.configs[:1], {}


def errors(paths, deadline, mine=lambda i: True):
    for path in paths:
        tensors, meta = read_safetensors(path)
        for case in json.loads(meta["cases"]):
            i = case["index"]
            if not mine(i):
                continue
            if time.time() > deadline:
                return log("out of time before case", i)
            name = case.pop("name", f"golden{i}")
            c, H = golden_case(tensors, case)
            ro, rs = first_heads(c, *reference(c), H)
            line = dict(op="kda_error", case=name, **case)
            if f"{i}.o" in tensors:
                # itself proved: unrounded inputs would give the file's o; rounded ones stay near it
                line |= dict(golden_distance=distance(ro, tensors[f"{i}.o"].to(DEVICE).double()))
            for form, f in (("chunk", chunk), ("recurrent", recurrent)):
                if form == "recurrent" and i not in (3, 4, 8):
                    continue
                try:
                    o, s = first_heads(c, *f(c), H)
                    emit(**line, form=form, error_o=distance(o, ro), error_state=distance(s, rs))
                except Exception as e:  # a peer's failure is a result
                    emit(**line, form=form, failed=(str(e).splitlines() or [repr(e)])[0][:200])
            log("case", name)


FORWARD = (("softplus", None, 1, 8192), ("softplus", None, 4, 8192), ("softplus", None, 1, 32768),
           ("bounded", -5.0, 1, 8192), ("bounded", -5.0, 4, 8192), ("bounded", -5.0, 1, 32768))


def forward(deadline, wanted):
    for gate, lower, B, T in FORWARD:
        if gate != wanted:
            continue
        if time.time() > deadline:
            return log("out of time before forward", gate, B, T)
        c = random_case(B, T, HEADS, WIDTH, WIDTH, lower)
        chunk(c)
        torch.cuda.synchronize()
        log("first call", gate, B, T)
        line = dict(op="kda_forward", gate=gate, H=HEADS, K=WIDTH, V=WIDTH, N=B, T_per_sequence=T)
        eager = time_ms(lambda: chunk(c))
        line |= dict(eager_ms_p50=percentiles(eager)["ms_p50"])
        try:
            graph = graph_of(lambda: chunk(c))
            emit(**line, timed="graph", **percentiles(time_ms(graph.replay)))
            del graph
        except Exception as e:
            log("no graph:", str(e).splitlines()[0])
            emit(**line, timed="eager", **percentiles(eager))


def decode(deadline):
    """A step of 20 layers, each with a state of its own, as a CUDA graph; ms are of one layer."""
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
    layers = 20
    for B in (1, 8, 64, 256):
        if time.time() > deadline:
            return log("out of time before decode", B)
        c = random_case(B, 1, HEADS, WIDTH, WIDTH)
        states = [torch.randn(B, HEADS, WIDTH, WIDTH, device=DEVICE) for _ in range(layers)]
        out = torch.empty_like(c["v"])

        def in_place():
            for s in states:
                fused_recurrent_kda_fwd(
                    q=c["q"], k=c["k"], v=c["v"], g=c["g"], beta=c["beta"], A_log=c["A_log"], dt_bias=c["dt_bias"],
                    initial_state=s, inplace_final_state=True, state_v_first=True, use_qk_l2norm_in_kernel=True,
                    use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, out=out)

        def as_layer():
            return [recurrent(c | {"h0": s}) for s in states]

        traffic = 2 * B * HEADS * WIDTH * WIDTH * 4
        for name, f in (("in_place", in_place), ("as_layer", as_layer)):
            if name == "as_layer" and B == 256:
                continue
            with torch.no_grad():
                t = [x / layers for x in time_ms(graph_of(f).replay)]
            emit(op="kda_decode", form=name, H=HEADS, K=WIDTH, V=WIDTH, N=B, T_per_sequence=1, layers=layers,
                 state_tb_s=round(traffic / statistics.median(t) / 1e9, 3), **percentiles(t))
            log("decode", B, name)


def pairs(path):
    ours = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    sizes = ("H", "K", "V", "N", "T_per_sequence")
    same_of = {"kda_forward": ("op", "gate") + sizes, "kda_decode": ("op",) + sizes, "kda_error": ("op", "case", "form")}
    key = lambda line, same: tuple(line.get(k) for k in same)
    for theirs in list(LINES):
        same = same_of.get(theirs["op"])
        for our in ours:
            if not same or our.get("by") == "peer" or key(our, same) != key(theirs, same):
                continue
            line = {k: theirs[k] for k in same if k in theirs} | {"form": theirs.get("form")}
            for field in ("ms_p50", "error_o", "error_state"):
                if our.get(field) is not None and theirs.get(field) is not None:
                    line |= {f"ours_{field}": our[field], f"peer_{field}": theirs[field],
                             f"ratio_{field}": round(our[field] / theirs[field], 4) if theirs[field] else math.inf}
            emit(op="pair", of=line.pop("op"), **line)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default="probe,forward,bounded,decode,errors")
    p.add_argument("--golden", help="kda_op.safetensors and more of its kind, by commas: errors on their cases")
    p.add_argument("--ours", help="JSON lines of our own benchmark, to be set beside these")
    p.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    p.add_argument("--compile", metavar="I/N", help="only fills Triton's cache, with the I-th of N shares: run N at once")
    a = p.parse_args()
    deadline = START + a.seconds
    log("torch", torch.__version__, torch.cuda.get_device_name())
    parts = a.parts.split(",")
    paths = a.golden.split(",") if a.golden else []
    if a.compile:
        return compile_share(*map(int, a.compile.split("/")), parts, paths, deadline)
    if "probe" in parts:
        probe()
        log("probed")
    import fla
    import triton
    emit(op="peer", fla=fla.__version__, torch=torch.__version__, triton=triton.__version__)
    if "forward" in parts:
        forward(deadline, "softplus")
    if "decode" in parts:
        decode(deadline)
    if "bounded" in parts:
        forward(deadline, "bounded")
    if "errors" in parts:
        untuned()
        errors(paths, deadline)
    if a.ours:
        pairs(a.ours)


def compile_share(i, n, parts, paths, deadline):
    import fla.ops.kda  # noqa: F401
    everything = [(t, t.configs) for t in tuners()]
    if "errors" in parts:
        untuned()
        widths = {}  # cases of one width and gate are of one share
        for path in paths:
            for c in json.loads(read_safetensors(path)[1]["cases"]):
                widths.setdefault((c["K"], c["V"], "lower" in c), []).append(c["index"])
        mine = {x for k, group in enumerate(widths.values()) if k % n == i for x in group[:2]}
        errors(paths, deadline, lambda x: x in mine)
    for gate, lower in (("forward", None), ("bounded", -5.0)):
        if gate not in parts or time.time() > deadline:
            continue
        for t, configs in everything:
            t.configs, t.cache = configs[i::n] or configs[:1], {}
        chunk(random_case(1, 8192, HEADS, WIDTH, WIDTH, lower))
        torch.cuda.synchronize()
        log("compiled", gate)
    if "decode" in parts and i == 0:
        decode(deadline)


if __name__ == "__main__":
    main()
