#!/usr/bin/env python3
"""Makes tests/data: small random checkpoints of other families with expected values. Needs torch, transformers, safetensors.

    make_llama_data.py [FOLDER]      (default: tests/data beside this script)

llama/*: LlamaForCausalLM in float32, run by transformers. expected.safetensors is laid out as golden/tiny-teacher's:
input_ids [2,T], hidden.0 = embedding, hidden.l = after layer l, the last one AFTER the final norm, logits, greedy [1,40] =
input_ids[0,:16] and the 24 ids that follow; its metadata says so too.
fla/swiglu: a model as flash-linear-attention (fla) writes it, a few of its names in older spellings, with the float64 reference
of this file, which is first held to tests/golden/tiny-kda and tiny-hybrid."""
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[1]

BASE = dict(vocab_size=80, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=192, bos_token_id=1, eos_token_id=2, pad_token_id=None, rms_norm_eps=1e-5)
# name: settings, tokens in a sequence, whether rotary settings are written the old way (rope_theta + rope_scaling)
VARIANTS = {
    # no biases, plain rotary angles; as many key/value heads as query heads, both left out of the file together with head_dim
    "plain": (dict(num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=64,
                   rope_parameters=dict(rope_type="default", rope_theta=10000.0)), 40, False),
    # every bias, a tied head, heads wider than width / heads, linear scaling in the old spelling
    "linear": (dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16,
                    rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)), 50, True),
    # Llama-3's frequencies, several end ids
    "llama3rope": (dict(num_hidden_layers=3, eos_token_id=[2, 7],
                        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                                             high_freq_factor=4.0, original_max_position_embeddings=32)), 60, False),
    # YaRN in the old spelling, a tied head, biases in the attention only
    "yarn": (dict(attention_bias=True, tie_word_embeddings=True,
                  rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=16.0, beta_slow=2.0,
                                       original_max_position_embeddings=48)), 60, True),
}


def config_json(config, name, old_spelling):
    """config.json as a published checkpoint has it; `old_spelling` as before transformers 5."""
    text = json.loads(config.to_json_string(use_diff=False))
    keep = ("architectures attention_bias bos_token_id dtype eos_token_id head_dim hidden_act hidden_size intermediate_size "
            "max_position_embeddings mlp_bias model_type num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
            "rope_parameters tie_word_embeddings vocab_size").split()
    out = {k: text[k] for k in keep if k in text}
    out["architectures"] = ["LlamaForCausalLM"]
    out["dtype"] = "float32"
    if name == "plain":
        for k in ("num_key_value_heads", "head_dim"):
            del out[k]
    if old_spelling:
        rope = dict(out.pop("rope_parameters"))
        out["torch_dtype"] = out.pop("dtype")
        out["rope_theta"] = rope.pop("rope_theta")
        if name == "linear":
            rope["type"] = rope.pop("rope_type")  # the oldest of the spellings
        out["rope_scaling"] = rope
    return out


class Unsuitable(Exception):
    """Greedy text that rounding could change, or that meets an end id."""


def greedy_ids(ids, logits_of):
    """The first 16 ids of sequence 0 and 24 greedy ones; and the smallest gap between a step's two best logits."""
    greedy = ids[:1, :16]
    while greedy.shape[1] < 40:
        greedy = torch.cat([greedy, logits_of(greedy)[:, -1].argmax(-1, keepdim=True)], 1)
    top = logits_of(greedy)[0, 15:-1].topk(2).values
    gap = float((top[:, 0] - top[:, 1]).min())
    if gap < 5e-3 or {2, 7} & set(greedy[0, 16:].tolist()):
        raise Unsuitable
    return greedy, gap


def first_suitable(make, *arguments):
    for seed in range(100):
        try:
            return make(*arguments, seed)
        except Unsuitable:
            pass
    raise SystemExit("no seed gives a clear greedy text")


@torch.no_grad()
def make_llama(folder, name, seed):
    settings, tokens, old_spelling = VARIANTS[name]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **settings}, attn_implementation="eager")).float().eval()
    for key, p in model.named_parameters():  # large enough that the layers, norms and biases matter
        if key.endswith("norm.weight"):
            p.uniform_(0.5, 1.5)
        else:
            p.normal_(0, 0.3 if key.endswith("bias") else 0.15)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model.config, name, old_spelling), indent=2) + "\n")
    tied = model.config.tie_word_embeddings
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    ids = torch.randint(3, model.config.vocab_size, (2, tokens))
    out = model(ids, output_hidden_states=True, use_cache=False)
    greedy, gap = greedy_ids(ids, lambda x: model(x, use_cache=False).logits)
    expected = {"input_ids": ids, "logits": out.logits, "greedy": greedy}
    expected.update({f"hidden.{i}": h for i, h in enumerate(out.hidden_states)})
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors",
              metadata={"note": "transformers LlamaForCausalLM, float32; the last hidden state is after the final norm"})

    again = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)  # the file as written
    worst = float((again(ids, use_cache=False).logits - out.logits).abs().max())
    assert worst == 0, f"{name}: read back, the logits differ by {worst}"
    return gap


def fla_config(**changes):
    """fla's KDAConfig as it is saved, with `changes`."""
    return {
        "architectures": ["KDAForCausalLM"], "model_type": "kda", "attn": None, "attn_mode": "chunk", "hidden_size": 2048,
        "expand_v": 1, "use_short_conv": True, "allow_neg_eigval": False, "conv_size": 4, "head_dim": 128, "num_heads": 16,
        "num_v_heads": None, "max_position_embeddings": 2048, "hidden_ratio": 4, "intermediate_size": None,
        "hidden_act": "swish", "num_hidden_layers": 24, "norm_eps": 1e-6, "use_cache": True, "pad_token_id": None,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.02, "fuse_norm": True,
        "fuse_swiglu": True, "fuse_cross_entropy": True, "use_l2warp": False, "vocab_size": 32000, "torch_dtype": "float32",
        **changes,
    }


def fla_names(weights):
    """Our names turned into fla's; a few tensors into older spellings still."""
    rename = [(".self_attn.", ".attn."), ("model.embed_tokens.", "model.embeddings."), (".input_layernorm.", ".attn_norm."),
              (".post_attention_layernorm.", ".mlp_norm.")]
    older = [("f_proj.0", "f_a_proj"), ("f_proj.1", "f_b_proj"), ("g_proj.0", "g_a_proj"), ("g_proj.1", "g_b_proj")]
    out = {}
    for name, value in weights.items():
        for a, b in rename + (older if ".layers.2." in name else []):
            name = name.replace(a, b)
        out[name] = (value.reshape(1, 1, -1, 1) if name.endswith("layers.0.attn.A_log") else value).contiguous()
    return out


def write(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- a plain KDA model in float64, one token after the other
def rms(x, w, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * w


def rotate(x, theta):
    """x [B,T,H,d]; angles rounded to float32 as every program of this family does."""
    half = x.shape[-1] // 2
    inv = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    angle = (torch.arange(x.shape[1], dtype=torch.float32)[:, None] * inv)[None, :, None].double()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def full_attention(x, w, heads, kv_heads, theta):
    B, T, _ = x.shape
    q, k, v = (torch.einsum("btd,nd->btn", x, w(n)).reshape(B, T, h, -1)
               for n, h in [("q_proj.weight", heads), ("k_proj.weight", kv_heads), ("v_proj.weight", kv_heads)])
    if theta:
        q, k = rotate(q, theta), rotate(k, theta)
    k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores.masked_fill_(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(B, T, -1)
    return o @ w("o_proj.weight").T


def kda_attention(x, w, heads, beta_scale, eps):
    """The mixer's output and its final state [B,H,K,V]."""
    B, T, _ = x.shape

    def conv(name):
        y = x @ w(f"{name}_proj.weight").T
        y = torch.cat([torch.zeros(B, 3, y.shape[-1], dtype=y.dtype), y], 1)
        taps = w(f"{name}_conv1d.weight")[:, 0]
        return torch.nn.functional.silu(sum(y[:, j:j + T] * taps[:, j] for j in range(4))).reshape(B, T, heads, -1)

    def unit(y):
        return y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)

    q, k, v = unit(conv("q")), unit(conv("k")), conv("v")
    z = x @ w("f_proj.0.weight").T @ w("f_proj.1.weight").T + w("dt_bias").reshape(-1)
    log_decay = -w("A_log").reshape(-1, 1).exp() * torch.nn.functional.softplus(z.reshape(k.shape))
    beta = beta_scale * torch.sigmoid(x @ w("b_proj.weight").T)
    S = torch.zeros(B, heads, k.shape[-1], v.shape[-1], dtype=x.dtype)
    rows = []
    for t in range(T):
        S = S * log_decay[:, t, :, :, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / k.shape[-1] ** 0.5)
    gate = x @ w("g_proj.0.weight").T @ w("g_proj.1.weight").T + w("g_proj.1.bias")
    o = rms(torch.stack(rows, 1), w("o_norm.weight"), eps) * torch.sigmoid(gate.reshape(v.shape))
    return o.reshape(B, T, -1) @ w("o_proj.weight").T, S


def forward(weights, ids, layers, heads, kv_heads, eps, theta, beta_scale=1):
    """expected.safetensors of a model under our names: hidden.l (the last before the final norm), logits, state.l."""
    weights = {k: v.double() for k, v in weights.items()}
    h = weights["model.embed_tokens.weight"][ids]
    out = {"hidden.0": h}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        x = rms(h, weights[at + "input_layernorm.weight"], eps)
        mixer = lambda name: weights[at + "self_attn." + name]  # noqa: E731
        if at + "self_attn.A_log" in weights:
            y, out[f"state.{layer}"] = kda_attention(x, mixer, heads, beta_scale, eps)
        else:
            y = full_attention(x, mixer, heads, kv_heads, theta)
        h = h + y
        x = rms(h, weights[at + "post_attention_layernorm.weight"], eps)
        up = x @ weights[at + "mlp.up_proj.weight"].T
        gate = weights.get(at + "mlp.gate_proj.weight")
        act = torch.relu(up) ** 2 if gate is None else torch.nn.functional.silu(x @ gate.T) * up
        h = h + act @ weights[at + "mlp.down_proj.weight"].T
        out[f"hidden.{layer + 1}"] = h
    out["logits"] = rms(h, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
    return out


def check_forward():
    """The reference above against golden/tiny-kda and tiny-hybrid, which others made. Returns the worst relative difference."""
    worst = 0.0
    for name in ("tiny-kda", "tiny-hybrid"):
        folder = ROOT / "tests/golden" / name
        c = json.loads((folder / "config.json").read_text())
        want = load_file(folder / "expected.safetensors")
        got = forward(load_file(folder / "model.safetensors"), want["input_ids"], c["num_hidden_layers"],
                      c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"], None)
        for key, value in got.items():
            worst = max(worst, float((value - want[key]).abs().max() / want[key].abs().max()))
    assert worst < 1e-5, worst
    return worst


@torch.no_grad()
def make_fla_swiglu(folder, seed):
    """SwiGLU whose width only the tensors tell, a full-attention layer in the middle with rotary positions, beta up to 2."""
    D, H, kv, K, L, vocabulary, mlp, eps = 32, 2, 1, 16, 3, 80, 256, 1e-6
    torch.manual_seed(seed)
    weights = {}

    def add(name, *shape, scale=0.2):
        weights[name] = torch.randn(*shape) * scale

    add("model.embed_tokens.weight", vocabulary, D)
    for layer in range(L):
        at = f"model.layers.{layer}."
        for n in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            weights[at + n] = torch.empty(D).uniform_(0.5, 1.5)
        for n, rows in [("q_proj", H * K), ("k_proj", (kv if layer == 1 else H) * K), ("v_proj", (kv if layer == 1 else H) * K)]:
            add(f"{at}self_attn.{n}.weight", rows, D)
        add(at + "self_attn.o_proj.weight", D, H * K)
        if layer != 1:
            for n in "qkv":
                add(f"{at}self_attn.{n}_conv1d.weight", H * K, 1, 4, scale=0.5)
            for n in "fg":
                add(f"{at}self_attn.{n}_proj.0.weight", K, D)
                add(f"{at}self_attn.{n}_proj.1.weight", H * K, K)
            add(at + "self_attn.g_proj.1.bias", H * K)
            add(at + "self_attn.b_proj.weight", H, D, scale=0.5)
            weights[at + "self_attn.A_log"] = torch.empty(H).uniform_(1, 8).log()
            weights[at + "self_attn.dt_bias"] = torch.empty(H * K).uniform_(-6, -1)
            weights[at + "self_attn.o_norm.weight"] = torch.empty(K).uniform_(0.5, 1.5)
        add(at + "mlp.gate_proj.weight", mlp, D)
        add(at + "mlp.up_proj.weight", mlp, D)
        add(at + "mlp.down_proj.weight", D, mlp, scale=0.1)
    weights["model.norm.weight"] = torch.empty(D).uniform_(0.5, 1.5)
    add("lm_head.weight", vocabulary, D)

    run = lambda ids: forward(weights, ids, L, H, kv, eps, 10000.0, beta_scale=2)  # noqa: E731
    ids = torch.randint(3, vocabulary, (2, 40))
    greedy, gap = greedy_ids(ids, lambda x: run(x)["logits"])
    expected = {"input_ids": ids, "greedy": greedy, **{k: v.float() for k, v in run(ids).items()}}
    attn = {"layers": [1], "num_heads": H, "num_kv_heads": kv, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
    write(folder, fla_config(hidden_size=D, head_dim=K, num_heads=H, num_hidden_layers=L, vocab_size=vocabulary, norm_eps=eps,
                             allow_neg_eigval=True, attn=attn), fla_names(weights))
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors",
              metadata={"note": "float64 reference of make_llama_data.py; the last hidden state is before the final norm"})
    return gap


def main():
    torch.set_num_threads(1)  # the same sums, so the same files, on every machine of a kind
    data = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/data"
    for name in VARIANTS:
        gap = first_suitable(make_llama, data / "llama" / name, name)
        print(f"llama/{name}: smallest gap of a greedy step {gap:.3g}")
    print(f"reference against golden: worst relative difference {check_forward():.2g}")
    print(f"fla/swiglu: smallest gap of a greedy step {first_suitable(make_fla_swiglu, data / 'fla/swiglu'):.3g}")


if __name__ == "__main__":
    main()
