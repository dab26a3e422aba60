#!/usr/bin/env python3
"""The same training step in PyTorch on the CPU, to compare `kda distill` with: by hand, needs torch.

nano-teacher to a KDA-only student, every parameter trainable, 4 sequences of 1024 tokens, KL to the teacher's dense
logits at T = 1, AdamW. KDA runs in chunks of 64 as batched matrix products and autograd differentiates it; nothing
loops over tokens. Decays of pairs within a square of 4 tokens are exponentials of differences, all others go through
a reference at the start of the later block, so that no exponent is above 0.

    python bench/train_peer.py --check                   the chunked form against the recurrence in float64
    python bench/train_peer.py --threads 2 --steps 3     tokens per second, fp32 and bf16 autocast
"""
import argparse
import json
import math
import statistics
import struct
import time
from pathlib import Path

import torch
import torch.nn.functional as F

CHUNK, BLOCK = 64, 4  # the fastest pair with chunks of 64 on two cores


def kda_recurrent(q, k, v, log_decay, beta):
    """q, k, log_decay [B,H,T,K], v [B,H,T,V], beta [B,H,T]: token by token."""
    state = q.new_zeros(*q.shape[:2], v.shape[-1], q.shape[-1])
    out = []
    for t in range(q.shape[2]):
        state = state * log_decay[:, :, t, None].exp()
        u = beta[:, :, t, None] * (v[:, :, t] - torch.einsum("bhvk,bhk->bhv", state, k[:, :, t]))
        state = state + u[..., None] * k[:, :, t, None]
        out.append(torch.einsum("bhvk,bhk->bhv", state, q[:, :, t]))
    return torch.stack(out, 2) * q.shape[-1] ** -0.5


def decayed_products(rows, k, b):
    """sum_d rows_t k_i exp(b_t - b_i) for i <= t: rows is a list of [..,C,K] -> one [..,C,C] for each."""
    C, K = k.shape[-2:]
    n = C // BLOCK
    lead = k.shape[:-2]
    cut = lambda x: x.reshape(*lead, n, BLOCK, K)
    bb, kb, xb = cut(b), cut(k), [cut(x) for x in rows]
    above = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=k.device).triu(1)
    difference = (bb.unsqueeze(-2) - bb.unsqueeze(-3)).masked_fill_(above[..., None], -math.inf)
    weighted = difference.exp_() * kb.unsqueeze(-3)  # [..,n,t,i,K]
    diagonal = [(weighted @ x.unsqueeze(-1)).squeeze(-1).unbind(-3) for x in xb]  # [..,t,i]
    # unbind, not slices: the gradient of a slice is a whole tensor of zeros
    b_blocks, k_blocks, x_blocks = bb.unbind(-3), kb.unbind(-3), [x.unbind(-3) for x in xb]
    out = [[] for _ in rows]
    for j in range(n):
        if j:
            r = b_blocks[j - 1][..., -1:, :]
            fall = (b_blocks[j] - r).exp()
            right = (torch.cat(k_blocks[:j], -2) * (r - torch.cat(b_blocks[:j], -2)).exp()).transpose(-1, -2)
        for m in range(len(rows)):
            row = [diagonal[m][j]]
            if j:
                row.insert(0, (x_blocks[m][j] * fall) @ right)
            if j + 1 < n:
                row.append(b.new_zeros(*lead, BLOCK, C - (j + 1) * BLOCK))
            out[m].append(torch.cat(row, -1))
    return [torch.cat(x, -2) for x in out]


def kda_chunked(q, k, v, log_decay, beta):
    """The same, T a multiple of 64."""
    B, H, T, K = q.shape
    V, N = v.shape[-1], T // CHUNK
    cut = lambda x: x.reshape(B, H, N, CHUNK, -1)
    q, k, v, g, beta = cut(q * K ** -0.5), cut(k), cut(v), cut(log_decay), beta.reshape(B, H, N, CHUNK, 1)
    b = g.cumsum(-2)
    last = b[..., -1:, :]
    P, L = decayed_products([q, k], k, b)
    decay = b.exp()
    system = beta * L.tril(-1)  # the solve takes its diagonal for ones
    right = beta * torch.cat([v, k * decay], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    parts = [x.unbind(2) for x in (solved[..., :V], solved[..., V:], q * decay, k * (last - b).exp(), last.exp(), P)]
    state = q.new_zeros(B, H, K, V)
    out = []
    for U0, W, Qd, Kd, E, p in zip(*parts):
        U = U0 - W @ state
        out.append(Qd @ state + p @ U)
        state = state * E.transpose(-1, -2) + Kd.transpose(-1, -2) @ U
    return torch.stack(out, 2).reshape(B, H, T, V)


def read_safetensors(path):
    data = Path(path).read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
    out = {}
    for name, t in json.loads(data[8:8 + n]).items():
        if name == "__metadata__":
            continue
        a, e = t["data_offsets"]
        out[name] = torch.frombuffer(bytearray(data[8 + n + a:8 + n + e]), dtype=kinds[t["dtype"]]).reshape(t["shape"])
    return {k: t.float() for k, t in out.items()}


class Model:
    """An `arcee` folder as it is, or with every layer turned into KDA (new parts as fla starts them)."""

    def __init__(self, folder, kda, seed=0):
        c = json.loads((Path(folder) / "config.json").read_text())
        self.H, self.G, self.d, self.D = (c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"],
                                          c["hidden_size"])
        self.layers, self.eps, self.theta = c["num_hidden_layers"], c["rms_norm_eps"], c["rope_parameters"]["rope_theta"]
        self.kda = kda
        self.w = {k: t for f in sorted(Path(folder).glob("model*.safetensors")) for k, t in read_safetensors(f).items()}
        r = torch.Generator().manual_seed(seed)
        for l in range(self.layers if kda else 0):
            a, H, d, D = f"model.layers.{l}.self_attn.", self.H, self.d, self.D
            for x in "kv":
                w = self.w[f"{a}{x}_proj.weight"].view(self.G, 1, d, D)
                self.w[f"{a}{x}_proj.weight"] = w.expand(self.G, H // self.G, d, D).reshape(H * d, D).clone()
            for x in "qkv":
                self.w[f"{a}{x}_conv1d.weight"] = torch.rand(H * d, 1, 4, generator=r) - 0.5
            normal = lambda *s: torch.randn(*s, generator=r) * s[-1] ** -0.5
            self.w |= {f"{a}f_proj.0.weight": normal(d, D), f"{a}f_proj.1.weight": normal(H * d, d),
                       f"{a}g_proj.0.weight": normal(d, D), f"{a}g_proj.1.weight": normal(H * d, d),
                       f"{a}g_proj.1.bias": torch.zeros(H * d), f"{a}b_proj.weight": normal(H, D),
                       f"{a}A_log": (1 + 15 * torch.rand(H, generator=r)).log(), f"{a}o_norm.weight": torch.ones(d)}
            step = (math.log(0.001) + torch.rand(H * d, generator=r) * math.log(100)).exp()
            self.w[f"{a}dt_bias"] = step + torch.log(-torch.expm1(-step))
        if kda:
            self.w = {k: t.requires_grad_() for k, t in self.w.items()}

    def norm(self, x, name):
        return F.rms_norm(x.float(), x.shape[-1:], self.w[name], self.eps)

    def attention(self, x, a):
        B, T, _ = x.shape
        heads = lambda n, name: F.linear(x, self.w[f"{a}{name}_proj.weight"]).view(B, T, n, self.d).transpose(1, 2)
        q, k, v = heads(self.H, "q"), heads(self.G, "k"), heads(self.G, "v")
        angle = torch.arange(T, device=x.device)[:, None] * self.theta ** (-torch.arange(0, self.d, 2, device=x.device) / self.d)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        turn = lambda y: y * cos + torch.cat([-y[..., self.d // 2:], y[..., :self.d // 2]], -1) * sin
        k, v = (y.repeat_interleave(self.H // self.G, 1) for y in (turn(k), v))
        o = F.scaled_dot_product_attention(turn(q).to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return F.linear(o.transpose(1, 2).reshape(B, T, -1), self.w[f"{a}o_proj.weight"])

    def delta(self, x, a):
        B, T, _ = x.shape
        w, H, d = self.w, self.H, self.d

        y = torch.cat([F.linear(x, w[f"{a}{name}_proj.weight"]) for name in "qkv"], -1)
        taps = torch.cat([w[f"{a}{name}_conv1d.weight"] for name in "qkv"])
        y = F.silu(F.conv1d(F.pad(y.transpose(1, 2), (3, 0)), taps, groups=3 * H * d))
        q, k, v = y.view(B, 3, H, d, T).transpose(3, 4).float().unbind(1)
        unit = lambda y: y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)
        low = lambda name: F.linear(F.linear(x, w[f"{a}{name}_proj.0.weight"]), w[f"{a}{name}_proj.1.weight"]).float()
        heads = lambda y: y.view(B, T, H, d).transpose(1, 2)
        q, k = unit(q), unit(k)
        log_decay = -w[f"{a}A_log"].exp()[:, None, None] * F.softplus(heads(low("f") + w[f"{a}dt_bias"]))
        beta = F.linear(x, w[f"{a}b_proj.weight"]).float().sigmoid().transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):  # products of 64 rows gain nothing from bf16 on a CPU
            o = kda_chunked(q, k, v, log_decay, beta).transpose(1, 2)
        o = self.norm(o, f"{a}o_norm.weight") * (low("g") + w[f"{a}g_proj.1.bias"]).view(B, T, H, d).sigmoid()
        return F.linear(o.reshape(B, T, -1), w[f"{a}o_proj.weight"])

    def logits(self, ids):
        x = F.embedding(ids, self.w["model.embed_tokens.weight"])
        for l in range(self.layers):
            p = f"model.layers.{l}."
            mixer = self.delta if self.kda else self.attention
            x = x + mixer(self.norm(x, p + "input_layernorm.weight"), p + "self_attn.")
            h = F.linear(self.norm(x, p + "post_attention_layernorm.weight"), self.w[p + "mlp.up_proj.weight"])
            x = x + F.linear(F.relu(h).square(), self.w[p + "mlp.down_proj.weight"])
        return F.linear(self.norm(x, "model.norm.weight"), self.w["lm_head.weight"])


def check():
    torch.manual_seed(0)
    B, H, T, K, V = 2, 2, 192, 32, 24
    for strength in (0.05, 1.0, 30.0):
        unit = lambda x: x / x.norm(dim=-1, keepdim=True)
        x = [unit(torch.randn(B, H, T, K)), unit(torch.randn(B, H, T, K)), torch.randn(B, H, T, V),
             -strength * F.softplus(2 * torch.randn(B, H, T, K)), torch.rand(B, H, T)]
        want_in = [t.double().requires_grad_() for t in x]
        got_in = [t.clone().requires_grad_() for t in x]
        want, got = kda_recurrent(*want_in), kda_chunked(*got_in)
        direction = torch.randn_like(want)
        (want * direction).sum().backward()
        (got * direction.float()).sum().backward()
        error = lambda a, b: float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        names = ["q", "k", "v", "log_decay", "beta"]
        errors = [error(got, want)] + [error(a.grad, b.grad) for a, b in zip(got_in, want_in)]
        print(f"decay x{strength}: o {errors[0]:.1e} " + " ".join(f"d_{n} {e:.1e}" for n, e in zip(names, errors[1:])))
        assert max(errors) < 2e-4, "the chunked form is wrong"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default=Path(__file__).parent.parent / "assets/nano-teacher")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--sequences", type=int, default=4)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--precision", choices=["f32", "bf16", "both"], default="both")
    p.add_argument("--check", action="store_true")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.set_flush_denormal(True)
    if o.check:
        return check()
    teacher = Model(o.teacher, kda=False)
    ids = torch.randint(3, 4096, (o.sequences, o.tokens), generator=torch.Generator().manual_seed(1))
    for precision in ["f32", "bf16"] if o.precision == "both" else [o.precision]:
        student = Model(o.teacher, kda=True)
        optimizer = torch.optim.AdamW(student.w.values(), lr=1e-4, fused=True)
        seconds = []
        for step in range(o.steps + 1):
            at = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                with torch.no_grad():
                    target = teacher.logits(ids).float().softmax(-1)
                logits = student.logits(ids).float()
            # KL but for the teacher's entropy, which has no gradient: one pass over the logits less
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - at)
        median = statistics.median(seconds[1:])
        print(f"torch {torch.__version__}, {o.threads} threads, {precision}: {ids.numel() / median:.0f} tok/s, "
              f"{median:.2f} s a step of {ids.numel()} tokens (median of {o.steps} after one), loss {float(loss.detach()):.4f}")


if __name__ == "__main__":
    main()
