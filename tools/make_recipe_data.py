#!/usr/bin/env python3
"""Makes the training text of the long distillation runs (docs/log) from the corpus that nano-teacher was trained on:
    tools/make_recipe_data.py CORPUS OUT [--every N --first I] [--cut CHARACTERS] [--needles N] [--seed N]
CORPUS holds train.jsonl.xz and synthetic.jsonl.xz. OUT gets text.jsonl (all rows, or rows I, I + N, ..; whole, or their
starts), first.jsonl (the first 4,000 characters of each), arithmetic.jsonl, and needle.jsonl: questions in the corpus' own form, with one needle in
sentences drawn from the training text or in the corpus' noise, of lengths whose tokens fit a training sequence of
1,280. The evaluation's files are not read. Every choice is fixed by the seed."""
import argparse
import json
import lzma
import pathlib
import random
import re

HEAD = ("A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Characters of the haystack and how often each length is drawn; essays three times in four.
LENGTHS, OFTEN = [800, 1500, 2200, 3000], [3, 2, 2, 6]
ESSAYS = 0.75
START = 4000  # characters of first.jsonl: 1,024 tokens and more


def lines(path):
    with lzma.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def sentences(rows):
    """Of the text, line breaks made spaces, as in the corpus' essays."""
    out = []
    for row in rows:
        for s in re.split(r"(?<=\.) +", row["text"].replace("\n", " ")):
            if 20 <= len(s) <= 400 and s.endswith("."):
                out.append(s)
    return out


def start_of(text, most=START):
    """Whole lines of it, if there is one."""
    if len(text) <= most:
        return text
    return text[: text.rfind("\n", 0, most) + 1 or most]


def needle(rng, pool, names):
    name = f"{rng.choice(names[0])}-{rng.choice(names[1])}"
    number = rng.randrange(1_000_000, 10_000_000)
    want = rng.choices(LENGTHS, OFTEN)[0] * rng.uniform(0.9, 1.08)
    essay = rng.random() < ESSAYS
    hay, size = [], 0
    while size < want:
        hay.append(rng.choice(pool) if essay else NOISE)
        size += len(hay[-1]) + 1
    hay.insert(rng.randrange(len(hay) + 1), f"One of the special magic numbers for {name} is: {number}.")
    asked = f"special magic number for {name} mentioned in the provided text"
    return HEAD + (" " if essay else "\n").join(hay) + f"\nWhat is the {asked}? The {asked} is {number}"


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("corpus", type=pathlib.Path)
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--every", type=int, default=1)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--cut", type=int, default=0)
    p.add_argument("--needles", type=int, default=6000)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    text = lines(a.corpus / "train.jsonl.xz")[a.first :: a.every]
    if a.cut:
        text = [{"source": r["source"], "text": start_of(r["text"], a.cut)} for r in text]
    made = lines(a.corpus / "synthetic.jsonl.xz")
    found = [re.findall(r"magic numbers for (\w+)-(\w+) is:", r["text"]) for r in made if r["source"] == "needle"]
    names = [sorted({pair[i] for row in found for pair in row}) for i in (0, 1)]
    rng = random.Random(a.seed)
    pool = sentences(text)
    write(a.out / "text.jsonl", text)
    write(a.out / "first.jsonl", [{"source": r["source"], "text": start_of(r["text"])} for r in text])
    write(a.out / "arithmetic.jsonl", [r for r in made if r["source"] == "arithmetic"])
    write(a.out / "needle.jsonl", [{"source": "needle", "text": needle(rng, pool, names)} for _ in range(a.needles)])


main()
