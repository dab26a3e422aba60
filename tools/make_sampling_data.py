#!/usr/bin/env python3
"""Writes tests/data/sampling/transformers.safetensors: distributions after transformers' own processors and warpers.

Each case is a list of settings in the order in which transformers' generate() applies them; `probs.N` [rows,vocabulary]
is the softmax of what case N left of `logits` given `tokens`, of which the first `prompt_length` are the prompt.
Needs: torch, transformers, safetensors.
"""
import json
import pathlib

import torch
import transformers.generation.logits_process as lp
from safetensors.torch import save_file

ROWS, VOCABULARY, LENGTH, PROMPT = 5, 150, 24, 16
EOS = [3, 77]

CASES = [
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3, "temperature": 0.7, "top_k": 20},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.7, "top_p": 0.9},
    {"repetition_penalty": 1.2},
    {"repetition_penalty": 0.6, "temperature": 1.5},
    {"repetition_penalty": 4.0, "temperature": 0.4, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
    {"min_new_tokens": 9},
    {"min_new_tokens": 8},
    {"min_new_tokens": 20, "top_k": 1},
    {"top_k": 4},
    {"top_k": 10},
    {"top_k": 149},
    {"top_k": 500},
    {"temperature": 0.3, "top_k": 10},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"temperature": 2.5, "top_p": 0.8},
    {"top_k": 25, "top_p": 0.7},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_p": 0.9, "min_p": 0.05},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"temperature": 0.6, "typical_p": 0.5},
    {"top_k": 12, "typical_p": 0.4},
    {"top_p": 0.8, "typical_p": 0.6},
    {"temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    {"logit_bias": {"5": 3.0, "6": -4.5, "149": 8.0}, "top_k": 15},
    {"logit_bias": {"0": 6.0, "140": -20.0}, "repetition_penalty": 1.5},
]


def processors(c):
    """In the order of transformers' GenerationMixin._get_logits_processor."""
    if "logit_bias" in c:
        yield lp.SequenceBiasLogitsProcessor({(int(k),): v for k, v in c["logit_bias"].items()})
    if "repetition_penalty" in c:
        yield lp.RepetitionPenaltyLogitsProcessor(c["repetition_penalty"])
    if "no_repeat_ngram_size" in c:
        yield lp.NoRepeatNGramLogitsProcessor(c["no_repeat_ngram_size"])
    if "min_new_tokens" in c:
        yield lp.MinNewTokensLengthLogitsProcessor(PROMPT, c["min_new_tokens"], EOS)
    if "temperature" in c:
        yield lp.TemperatureLogitsWarper(c["temperature"])
    if "top_k" in c:
        yield lp.TopKLogitsWarper(c["top_k"])
    if "top_p" in c:
        yield lp.TopPLogitsWarper(c["top_p"])
    if "min_p" in c:
        yield lp.MinPLogitsWarper(c["min_p"])
    if "typical_p" in c:
        yield lp.TypicalLogitsWarper(c["typical_p"])


def main():
    torch.manual_seed(7)
    logits = torch.randn(ROWS, VOCABULARY) * torch.tensor([[1.0], [2.5], [5.0], [2.0], [0.0]])
    logits[2, ::7] = -float("inf")
    # Row 3 has few distinct values, so that many stand at the k-th; row 4 is all the same.
    logits[3] = torch.round(logits[3])
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    # Short cycles and common endings, so that n-grams really repeat and likely ids are among those seen.
    for row in range(ROWS):
        likely = torch.topk(logits[row], 4).indices
        tokens[row, 2:6] = likely
        tokens[row, 8:11] = likely[:3]
        tokens[row, -2:] = likely[:2]
    logits[0, EOS] = torch.tensor([4.0, 3.9])

    tensors = {"logits": logits, "tokens": tokens}
    for n, case in enumerate(CASES):
        scores = logits.clone()
        for p in processors(case):
            scores = p(tokens, scores)
        tensors[f"probs.{n}"] = torch.softmax(scores, dim=-1)
        same = torch.allclose(tensors[f"probs.{n}"], torch.softmax(logits, dim=-1))
        if same and case not in ({"min_new_tokens": 8}, {"top_k": 500}):
            raise SystemExit(f"case {n} {case} changes nothing: it proves nothing")
    folder = pathlib.Path(__file__).resolve().parent.parent / "tests/data/sampling"
    folder.mkdir(parents=True, exist_ok=True)
    # Which of equal logits top_p keeps is up to torch's unstable sort: of these rows only the set of values counts.
    metadata = {"cases": json.dumps(CASES), "prompt_length": str(PROMPT), "eos_ids": json.dumps(EOS),
                "rows_with_ties": "[3, 4]"}
    save_file(tensors, folder / "transformers.safetensors", metadata)


if __name__ == "__main__":
    main()
