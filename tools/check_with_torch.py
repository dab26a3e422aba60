#!/usr/bin/env python3
"""Opens a model folder without any of our code and compares its logits with what `kda score` computes.

    python tools/check_with_torch.py FOLDER.. [--kda build/release/kda] [--bar 2e-5]

Needs torch and safetensors. KDA layers are run token by token in float64, written from their definition; their
folders need nothing else. A folder of full attention alone goes through transformers, in float64 as well. The figure
is the largest difference of a logit divided by the largest logit, over every position of a few sequences; 1 is
returned when it is above the bar for any folder.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

torch.set_default_dtype(torch.float64)


def read_weights(folder):
    out = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, "pt") as f:
            out |= {name: f.get_tensor(name).double() for name in f.keys()}
    return out


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def inverse_frequencies(config, d):
    """As transformers rounds them: every step in float32."""
    rope = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    if (rope or old).get("rope_type", (rope or old).get("type", "default")) != "default":
        raise SystemExit("only plain rotary positions are known here")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    return 1.0 / (theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d))


def full_attention(x, w, config, rotary):
    T = x.shape[0]
    H, G = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    d = config.get("head_dim") or config["hidden_size"] // H

    def project(name, heads):
        y = x @ w(f"{name}_proj.weight").T
        if w(f"{name}_proj.bias", optional=True) is not None:
            y = y + w(f"{name}_proj.bias")
        return y.view(T, heads, d)

    q, k, v = project("q", H), project("k", G), project("v", G)
    if rotary:
        angle = (torch.arange(T, dtype=torch.float32)[:, None] * inverse_frequencies(config, d)).double()
        cos, sin = torch.cat([angle, angle], -1).cos()[:, None], torch.cat([angle, angle], -1).sin()[:, None]
        turn = lambda y: y * cos + torch.cat([-y[..., d // 2:], y[..., :d // 2]], -1) * sin
        q, k = turn(q), turn(k)
    out = torch.empty(T, H, d)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    for h in range(H):
        g = h // (H // G)
        scores = (q[:, h] @ k[:, g].T * d ** -0.5).masked_fill(~visible, -torch.inf)
        out[:, h] = scores.softmax(-1) @ v[:, g]
    y = out.reshape(T, H * d) @ w("o_proj.weight").T
    bias = w("o_proj.bias", optional=True)
    return y if bias is None else y + bias


def kda(x, w, config):
    T = x.shape[0]
    A_log = w("A_log").flatten()
    H, V = A_log.numel(), w("o_norm.weight").numel()
    K = w("q_proj.weight").shape[0] // H

    def convolved(name):
        y = x @ w(f"{name}_proj.weight").T
        taps = w(f"{name}_conv1d.weight").reshape(-1, 4)
        padded = torch.cat([y.new_zeros(3, y.shape[1]), y])
        y = sum(padded[j:j + T] * taps[:, j] for j in range(4))
        return y * torch.sigmoid(y)

    unit = lambda y: y * (y.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt()
    q, k, v = unit(convolved("q").view(T, H, K)), unit(convolved("k").view(T, H, K)), convolved("v").view(T, H, V)
    low = lambda name: x @ w(f"{name}_proj.0.weight").T @ w(f"{name}_proj.1.weight").T
    z = (low("f") + w("dt_bias").flatten()).view(T, H, K)
    lower = config.get("lower_bound")
    rate = A_log.exp()[:, None]
    log_decay = -rate * torch.nn.functional.softplus(z) if lower is None else lower * torch.sigmoid(rate * z)
    beta = torch.sigmoid(x @ w("b_proj.weight").T) * (2 if config.get("allow_neg_eigval") else 1)
    state = torch.zeros(H, V, K)
    out = torch.empty(T, H, V)
    for t in range(T):
        state = state * log_decay[t].exp()[:, None, :]
        error = v[t] - (state * k[t][:, None, :]).sum(-1)
        state = state + (beta[t][:, None] * error)[..., None] * k[t][:, None, :]
        out[t] = K ** -0.5 * (state * q[t][:, None, :]).sum(-1)
    gate = torch.sigmoid(low("g") + w("g_proj.1.bias")).view(T, H, V)
    eps = config["rms_norm_eps"]
    return (rms_norm(out, w("o_norm.weight"), eps) * gate).reshape(T, H * V) @ w("o_proj.weight").T


def own_logits(folder, sequences):
    """Of an arcee_kda folder: layers are what config.json says, which must agree with the tensors."""
    config, weights = json.loads((Path(folder) / "config.json").read_text()), read_weights(folder)
    eps, layers = config["rms_norm_eps"], config["num_hidden_layers"]
    kinds = config.get("layer_types")
    used = set()

    def get(name, optional=False):
        used.add(name)
        return weights.get(name) if optional else weights[name]

    out = []
    for ids in sequences:
        x = get("model.embed_tokens.weight")[torch.tensor(ids)]
        for l in range(layers):
            p = f"model.layers.{l}."
            w = lambda part, optional=False: get(p + "self_attn." + part, optional)
            is_kda = p + "self_attn.A_log" in weights
            if kinds and (kinds[l] == "linear_attention") != is_kda:
                raise SystemExit(f"{folder}: layer {l} is {kinds[l]} in config.json, but the tensors say otherwise")
            h = rms_norm(x, get(p + "input_layernorm.weight"), eps)
            rotary = config["no_rope_layers"][l] == 1 if "no_rope_layers" in config else True
            x = x + (kda(h, w, config) if is_kda else full_attention(h, w, config, rotary))
            h = rms_norm(x, get(p + "post_attention_layernorm.weight"), eps)
            up = h @ get(p + "mlp.up_proj.weight").T
            if config["hidden_act"] == "relu2":
                up = up.relu() ** 2
            else:
                up = torch.nn.functional.silu(h @ get(p + "mlp.gate_proj.weight").T) * up
            x = x + up @ get(p + "mlp.down_proj.weight").T
        x = rms_norm(x, get("model.norm.weight"), eps)
        out.append(x @ get("model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight").T)
    unused = set(weights) - used
    if unused:
        raise SystemExit(f"{folder}: tensors that nothing used: {sorted(unused)[:5]}")
    return out


def transformers_logits(folder, sequences):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in sequences]


def our_logits(program, folder, sequences):
    with tempfile.TemporaryDirectory() as temp:
        (Path(temp) / "ids.json").write_text(json.dumps(sequences))
        subprocess.run([program, "score", "-m", folder, "--precision", "exact", "--ids-file", f"{temp}/ids.json",
                        "--out", f"{temp}/out.safetensors"], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        with safe_open(f"{temp}/out.safetensors", "pt") as f:
            return [f.get_tensor(f"logits.{i}").double() for i in range(len(sequences))]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="+")
    p.add_argument("--kda", default=str(Path(__file__).parent.parent / "build/release/kda"))
    p.add_argument("--ids", help="a JSON list of lists of ids; without it two sequences of other ids, 300 and 77 long")
    p.add_argument("--bar", type=float, default=2e-5)
    o = p.parse_args()
    torch.set_num_threads(1)
    bad = False
    for folder in o.folders:
        config = json.loads((Path(folder) / "config.json").read_text())
        draw = torch.Generator().manual_seed(1)
        sequences = (json.loads(Path(o.ids).read_text()) if o.ids else
                     [torch.randint(0, config["vocab_size"], (n,), generator=draw).tolist() for n in (300, 77)])
        kda_model = config["model_type"] == "arcee_kda"
        want = (own_logits if kda_model else transformers_logits)(folder, sequences)
        got = our_logits(o.kda, folder, sequences)
        size = max(float(x.abs().max()) for x in want)
        worst = max(float((a - b).abs().max()) for a, b in zip(got, want)) / size
        if not worst <= o.bar:  # a NaN too
            bad = True
        print(f"{folder}: {'own float64' if kda_model else 'transformers float64'}, largest logit {size:.2f}, "
              f"relative difference {worst:.2e} {'ok' if worst <= o.bar else 'ABOVE the bar of ' + str(o.bar)}",
              flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
