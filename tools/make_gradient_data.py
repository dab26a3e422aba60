#!/usr/bin/env python3
"""Makes tests/data/training: gradients that no golden file holds, of the small models in tests/data and tests/golden. Needs
torch, transformers, safetensors.

    make_gradient_data.py [FOLDER]      (default: tests/data/training beside this script)

MODEL.safetensors: `loss`, the mean next-token cross-entropy over both rows of the model's own input_ids, and grad.NAME under
our names, by autograd in float64: transformers for llama and arcee, the reference of make_llama_data.py for fla/swiglu.
Rotary positions of every kind, grouped heads, biases, SwiGLU, a tied head, beta up to 2. Left out to keep the files small: the
MLP's matrices (but of linear and swiglu), embedding and head (but of linear)."""
import pathlib
import re
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from make_llama_data import ROOT, forward

MODELS = {"plain": "tests/data/llama/plain", "linear": "tests/data/llama/linear", "llama3rope": "tests/data/llama/llama3rope",
          "yarn": "tests/data/llama/yarn", "swiglu": "tests/data/fla/swiglu", "tiny-teacher": "tests/golden/tiny-teacher"}


def cross_entropy(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def by_transformers(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    loss = cross_entropy(model(ids, use_cache=False).logits, ids)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def our_name(name):
    for a, b in [(".attn.", ".self_attn."), ("model.embeddings.", "model.embed_tokens."), (".attn_norm.", ".input_layernorm."),
                 (".mlp_norm.", ".post_attention_layernorm."), ("f_a_proj", "f_proj.0"), ("f_b_proj", "f_proj.1"),
                 ("g_a_proj", "g_proj.0"), ("g_b_proj", "g_proj.1")]:
        name = name.replace(a, b)
    return name


def by_reference(folder, ids):
    weights = {our_name(k): v.double().reshape(-1) if k.endswith("A_log") else v.double()
               for k, v in load_file(folder / "model.safetensors").items()}
    for w in weights.values():
        w.requires_grad_()
    loss = cross_entropy(forward(weights, ids, 3, 2, 1, 1e-6, 10000.0, beta_scale=2)["logits"], ids)
    loss.backward()
    return loss, {name: w.grad for name, w in weights.items()}


def main():
    torch.set_num_threads(1)
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/data/training"
    out.mkdir(parents=True, exist_ok=True)
    for name, path in MODELS.items():
        ids = load_file(ROOT / path / "expected.safetensors")["input_ids"]
        loss, gradients = (by_reference if name == "swiglu" else by_transformers)(ROOT / path, ids)
        large = r"embed_tokens|lm_head" if name == "swiglu" else r"mlp\..*weight|embed_tokens|lm_head"
        kept = {f"grad.{k}": g.float().contiguous() for k, g in gradients.items()
                if name == "linear" or not re.search(large, k)}
        save_file({"loss": loss.detach().float().reshape(1), **kept}, out / f"{name}.safetensors",
                  metadata={"note": f"mean next-token cross-entropy of {path} and its gradients, float64"})
        print(f"{name}: loss {loss.item():.6f}, {len(kept)} gradients")


if __name__ == "__main__":
    main()
