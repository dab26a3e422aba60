#!/usr/bin/env python3
"""Compares `kda tokenize` and `kda detokenize` with Hugging Face `tokenizers`, in one run on one machine.

  compare_tokenizer.py --program build/release/kda TOKENIZER.json... [--texts 20000] [--seed 1] [--characters]
                       [--speed CORPUS.jsonl] [--load]

--texts N      N random texts (code points of Unicode 14, white space, marks, emoji, the tokenizer's own special tokens):
               ids with and without special tokens, and the decoded text, must be identical
--characters   every code point of Unicode 14 in a few surroundings, the same comparison
--speed FILE   MB/s on one thread over the texts of FILE, each alone and all as one text
--load         seconds of the whole command for one word, against reading the file with `tokenizers`
Exits 1 when anything differs. Needs the `tokenizers` package.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer  # noqa: E402

import make_tokenizer_data as data  # noqa: E402


class Program:
    def __init__(self, program, folder):
        self.program, self.folder = program, pathlib.Path(folder)

    def lines(self, command, tokenizer, rows, *flags):
        file = self.folder / "rows.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = subprocess.run([self.program, command, "-m", tokenizer, "--jsonl", file, *flags], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{command}: {done.stderr}")
        return [json.loads(line) for line in done.stdout.split("\n")[:-1]], done.stderr


def decode(t, ids, skip):
    try:
        return t.decode(ids, skip_special_tokens=skip)
    except BaseException as e:  # its Strip panics on an empty text
        if type(e).__name__ != "PanicException":
            raise
        return None


def compare(program, path, t, texts, what):
    wrong = 0
    for special in (True, False):
        flags = [] if special else ["--no-special"]
        got, _ = program.lines("tokenize", path, texts, *flags)
        want = [t.encode(x, add_special_tokens=special).ids for x in texts]
        bad = [i for i in range(len(texts)) if got[i]["tokens"] != want[i]]
        decoded, _ = program.lines("detokenize", path, want, *([] if special else ["--skip-special"]))
        expect = [decode(t, ids, not special) for ids in want]
        bad_text = [i for i in range(len(texts)) if expect[i] is not None and decoded[i]["text"] != expect[i]]
        for i in bad[:3]:
            print(f"  {texts[i]!r}\n    got  {got[i]['tokens']}\n    want {want[i]}")
        for i in bad_text[:3]:
            print(f"  {want[i]}\n    got  {decoded[i]['text']!r}\n    want {expect[i]!r}")
        wrong += len(bad) + len(bad_text)
        print(f"{path}: {what}, special tokens {'on' if special else 'off'}: {len(texts)} texts, {sum(map(len, want))} ids, "
              f"{len(bad)} differ, {len(bad_text)} decoded texts differ", flush=True)
    return wrong


def characters():
    chars = [chr(c) for c in data.ASSIGNED]
    return ["a" + c + "\u0323\u0301b " + c + c + "1" for c in chars] + ["".join(chars[i:i + 50]) for i in range(0, len(chars), 50)]


def speed(program, path, t, corpus, repeats=5):
    texts = data.texts_of(corpus)
    for what, rows in (("each text", texts), ("one text", ["\n".join(texts)])):
        size = sum(len(x.encode()) for x in rows) / 1e6
        theirs, ours = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            for x in rows:
                t.encode(x)
            theirs.append(size / (time.perf_counter() - start))
            ours.append(float(program.lines("tokenize", path, rows)[1].split()[-2]))
        a, b = statistics.median(ours), statistics.median(theirs)
        print(f"{path}: {what}, {size:.2f} MB: kda {a:.1f} MB/s, tokenizers {b:.1f} MB/s, ratio {a / b:.1f} (medians of {repeats})")


def load(program, path, repeats=5):
    ours, theirs = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([program.program, "tokenize", "-m", path, "-p", "x"], check=True, capture_output=True)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        Tokenizer.from_file(path)
        theirs.append(time.perf_counter() - start)
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB: whole command {statistics.median(ours):.3f} s, "
          f"tokenizers {statistics.median(theirs):.3f} s (medians of {repeats})")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--program", required=True)
    p.add_argument("--texts", type=int, default=0)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--characters", action="store_true")
    p.add_argument("--speed")
    p.add_argument("--load", action="store_true")
    p.add_argument("tokenizers", nargs="+")
    a = p.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        program = Program(a.program, folder)
        for path in a.tokenizers:
            t = Tokenizer.from_file(path)
            if a.texts:
                r = random.Random(a.seed)
                special = data.specials_of(t)
                wrong += compare(program, path, t, [data.random_text(r, special) for _ in range(a.texts)], "random texts")
            if a.characters:
                wrong += compare(program, path, t, characters(), "every character")
            if a.speed:
                speed(program, path, t, a.speed)
            if a.load:
                load(program, path)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
