#!/usr/bin/env python3
"""Makes assets/demo from the corpus and the questions that nano-teacher was trained and measured with:
    tools/make_demo_data.py SHARED assets/demo
SHARED holds corpus/ and nano-eval/. Every choice is fixed, so the same inputs give the same files."""
import json
import lzma
import math
import pathlib
import sys

TEXT_BYTES = 1_310_000   # of manuals and dictionaries,
NEEDLE_BYTES = 850_000   # of needles in haystacks,
SUM_BYTES = 250_000      # and of arithmetic
LONGEST = 6_000          # characters of one document: about 2,000 tokens
NEEDLE_LONGEST = 1_500   # of one with needles: it must fit in the 512 tokens of a training sequence, or its question loses its needle
HELD_OUT = 24            # documents of valid.jsonl, the first HELD_OUT_CHARS of each
HELD_OUT_CHARS = 2_000
NEEDLES = [("noise", 800), ("essay", 800), ("noise", 3000), ("essay", 3000)]  # ten of each, 1 key
SUMS = 60


def lines(path):
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8")
    with opened as f:
        return [json.loads(line) for line in f]


def spread(rows, budget):
    """Rows from all over the list whose texts, cut to LONGEST at a line's end, make up `budget` bytes."""
    out, used = [], 0
    step = 97  # neighbours in the file are far apart here; none is met twice while step and length share no factor
    while math.gcd(step, len(rows)) > 1:
        step += 2
    for i in range(len(rows)):
        row = rows[i * step % len(rows)]
        text = row["text"]
        if len(text) > LONGEST:
            text = text[: text.rfind("\n", 0, LONGEST) + 1 or LONGEST].rstrip()
        if used + len(text.encode()) > budget:
            continue
        used += len(text.encode())
        out.append({"source": row["source"], "text": text})
        if used > budget - 2000:
            break
    return out


def write(path, rows, packed=False):
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    if packed:
        data = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(data)
    print(f"{path}: {len(rows)} lines, {len(data)} bytes")


def main():
    shared, out = map(pathlib.Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    text = lines(shared / "corpus/train.jsonl.xz")
    made = lines(shared / "corpus/synthetic.jsonl.xz")
    # A needle is cut nowhere: its question stands at its end.
    needles = [r for r in made if r["source"] == "needle" and len(r["text"]) <= NEEDLE_LONGEST]
    sums = [r for r in made if r["source"] == "arithmetic"]
    parts = [spread(text, TEXT_BYTES), spread(needles, NEEDLE_BYTES), spread(sums, SUM_BYTES)]
    rows = sorted((((i + 0.5) / len(p), k, r) for k, p in enumerate(parts) for i, r in enumerate(p)), key=lambda x: x[:2])
    write(out / "train.jsonl.xz", [r for _, _, r in rows], packed=True)
    valid = lines(shared / "corpus/valid.jsonl")
    picked = [valid[i * len(valid) // HELD_OUT] for i in range(HELD_OUT)]
    write(out / "heldout.jsonl", [{"source": r["source"], "text": r["text"][:HELD_OUT_CHARS]} for r in picked])
    asked = lines(shared / "nano-eval/needle.jsonl.xz")
    write(out / "needles.jsonl", [q for haystack, chars in NEEDLES for q in
                                  [q for q in asked if (q["haystack"], q["keys"], q["chars"]) == (haystack, 1, chars)][:10]])
    write(out / "arithmetic.jsonl", lines(shared / "nano-eval/arithmetic.jsonl")[:SUMS])


if __name__ == "__main__":
    main()
