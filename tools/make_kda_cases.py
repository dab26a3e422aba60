#!/usr/bin/env python3
"""Cases for `kda bench kda --golden` and bench/cuda_peer.py beyond kda_op's: lengths around the chunk's, gates at their
ends, and keys that come back with nothing forgotten. Inputs only, in kda_op's layout; needs numpy.

    python tools/make_kda_cases.py cases.safetensors
    python tools/make_kda_cases.py long.safetensors --tokens 100000
"""
import argparse
import json
import struct

import numpy as np

K = V = 128
NEVER = -60.0  # a gate logit: no decay in fp32, for any rate


def case(name, T, rng, H=1, **fields):
    n = lambda *s: rng.standard_normal(s).astype(np.float32)
    x = dict(q=n(1, T, H, K), k=n(1, T, H, K), v=n(1, T, H, V), g_raw=n(1, T, H, K), beta_raw=n(1, T, H),
             A_log=np.log(rng.uniform(1, 16, H)).astype(np.float32), dt_bias=np.zeros(H * K, np.float32),
             h0=0.3 * n(1, H, K, V))
    return dict(name=name, B=1, T=T, H=H, K=K, V=V, **fields), x


def gates(rng):
    for kind in ("strong", "weak", "mixed", "extreme", "saturated"):
        c, x = case(f"gate_{kind}", 200, rng, H=2)
        g, pick = np.abs(x["g_raw"]), rng.uniform(-1, 1, x["g_raw"].shape)
        x["g_raw"] = {"strong": 20 * g, "weak": -8 - 2 * g, "mixed": np.where(pick > 0.8, 30 * g, -9 + 0 * g),
                      "extreme": np.where(pick < -0.8, 300, np.where(pick < -0.6, -300, np.where(pick < 0, -20, g))),
                      "saturated": -15 + 0 * g}[kind].astype(np.float32)
        if kind == "saturated":
            x["beta_raw"] *= 50
            x["k"][:, ::5] = 0
        yield c, x


def same_keys(rng):
    """Keys that point one way (or two), no decay unless said: with beta 2 each token reflects the state."""
    sets = [(f"equal_keys_beta{b}_T{T}", T, b, 0, NEVER) for b in (2.0, 1.9, 1.5, 1.0) for T in (256,)]
    sets += [("equal_keys_beta2.0_T1000", 1000, 2.0, 0, NEVER), ("equal_keys_beta1.999_T1000", 1000, 1.999, 0, NEVER),
             ("near_keys_beta2.0_T256", 256, 2.0, 0.03, NEVER), ("near_keys_beta2.0_T1000", 1000, 2.0, 0.3, NEVER),
             ("equal_keys_beta2.0_weak_decay", 1000, 2.0, 0, -10.0), ("equal_keys_beta2.0_some_decay", 256, 2.0, 0, -6.0),
             ("two_keys_beta2.0", 1000, 2.0, "two", NEVER), ("own_keys_beta2.0", 1000, 2.0, "own", NEVER),
             ("sign_keys_beta2.0", 256, 2.0, "sign", NEVER)]
    for name, T, beta, spread, gate in sets:
        c, x = case(name, T, rng, H=2, neg=True)
        base = rng.standard_normal((2, 1, 1, 2, K)).astype(np.float32)
        t = np.arange(T)[None, :, None, None]
        if spread == "two":
            x["k"] = np.where(rng.uniform(size=(1, T, 1, 1)) < 0.5, base[0], base[1]).astype(np.float32)
        elif spread == "sign":
            x["k"] = (base[0] * np.where(t % 3 == 0, -1, 1)).astype(np.float32)
        elif spread != "own":
            x["k"] = (base[0] + spread * x["k"]).astype(np.float32)
        x["g_raw"][:] = gate
        x["beta_raw"][:] = 40 if beta == 2 else np.log(beta / (2 - beta))
        yield c, x


def write(path, cases):
    head, blobs, at = {"__metadata__": {}}, [], 0
    listed = []
    for i, (c, x) in enumerate(cases):
        listed.append({"index": 100 + i} | c)
        for name, t in x.items():
            b = np.ascontiguousarray(t, np.float32).tobytes()
            head[f"{100 + i}.{name}"] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + len(b)]}
            blobs.append(b)
            at += len(b)
    head["__metadata__"]["cases"] = json.dumps(listed)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--tokens", type=int, help="one case of so many tokens instead")
    a = p.parse_args()
    rng = np.random.default_rng(7)
    if a.tokens:
        return write(a.out, [case(f"T{a.tokens}", a.tokens, rng)])
    cases = [case(f"T{T}", T, rng, H=2) for T in (1, 2, 3, 15, 16, 17, 63, 64, 65)]
    write(a.out, cases + list(gates(rng)) + list(same_keys(rng)))


if __name__ == "__main__":
    main()
