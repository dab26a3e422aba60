#!/usr/bin/env python3
"""Writes tests/data/tokenizers: small tokenizers, each with texts and what Hugging Face `tokenizers` makes of them.

  make_tokenizer_data.py CORPUS.jsonl OUT_DIR

NAME.json is the tokenizer, NAME.jsonl has on each line {"text", "ids", "plain" (without special tokens), "decoded",
"skipped" (decoded without special tokens)}. Needs the `tokenizers` package (made with 0.23.3) and a Python whose unicodedata is
Unicode 14 (3.11). tools/compare_tokenizer.py draws its random texts from here too.
"""
import json
import pathlib
import random
import sys
import unicodedata

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

assert unicodedata.unidata_version == "14.0.0", unicodedata.unidata_version

ASSIGNED = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
MARKS = [chr(c) for c in ASSIGNED if unicodedata.category(chr(c))[0] == "M"]
NUMBERS = [chr(c) for c in ASSIGNED if unicodedata.category(chr(c))[0] == "N"]
PUNCTUATION = [chr(c) for c in ASSIGNED if unicodedata.category(chr(c))[0] == "P"]
CASED = [chr(c) for c in ASSIGNED if unicodedata.category(chr(c)) in ("Lu", "Lt", "Ll")]
SPACES = [" "] * 12 + list("\n\n\n\r\t\t\x0b\x0c\x85\xa0\u1680\u180e\u2000\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff")
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "☎", "1️⃣"]
WORDS = ["the", "theory", "don't", "WE'LL", "they'Ve", "'s", "'S", "'ſ", "can't", "of", "Straße", "naïve", "İstanbul", "ﬁne", "Ångström",
         "ＡＢＣ", "한국어", "각", "日本語", "नमस्ते", "العربية", "שלום", "ไทย", "Ωμέγα", "12345", "3.14159", "①②", "¼", "x²", "e\u0301",
         "o\u0308\u0304", "\u1100\u1161\u11a8", "ǆ", "Ⓐ", "ⅷ", "a_b", "…", "—", "«x»", "$5", "+", "^", "`", "|", "\u200d", "\ufffd", "\x00", "\x7f"]


def random_text(r, specials=()):
    """A text of up to about 60 characters: any code points, white space, marks, words, emoji, the tokenizer's own specials."""
    parts = []
    for _ in range(r.randint(0, 12)):
        k = r.random()
        if k < 0.22:
            parts.append("".join(chr(r.choice(ASSIGNED)) for _ in range(r.randint(1, 4))))
        elif k < 0.42:
            parts.append("".join(r.choice(SPACES) for _ in range(r.randint(1, 4))))
        elif k < 0.62:
            parts.append(r.choice(WORDS) * r.choice((1, 1, 1, 2)))
        elif k < 0.67:
            parts.append(r.choice(EMOJI))
        elif k < 0.72:
            parts.append(r.choice("aeoAhक") + "".join(r.choice(MARKS) for _ in range(r.randint(1, 3))))
        elif k < 0.77:
            parts.append("".join(r.choice(NUMBERS) if r.random() < 0.3 else r.choice("0123456789") for _ in range(r.randint(1, 7))))
        elif k < 0.82:
            parts.append("".join(r.choice(PUNCTUATION) for _ in range(r.randint(1, 3))))
        elif k < 0.86:
            parts.append("".join(r.choice(CASED) for _ in range(r.randint(1, 4))))
        elif k < 0.93 and specials:
            parts.append(r.choice(specials))
        else:
            parts.append("".join(chr(r.randint(32, 126)) for _ in range(r.randint(1, 8))))
        if r.random() < 0.3:
            parts.append(" ")
    return "".join(parts)


GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4 = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
GPT4O = (r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
         r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
         r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(**kw):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **kw})


def train(texts, size, pre=None, normalizer=None, specials=(), alphabet=(), **model):
    t = Tokenizer(models.BPE(**model))
    if pre:
        t.pre_tokenizer = pre
    if normalizer:
        t.normalizer = normalizer
    words = {k: model[k] for k in ("continuing_subword_prefix", "end_of_word_suffix") if k in model}
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials), initial_alphabet=list(alphabet),
                                                     show_progress=False, limit_alphabet=300 if alphabet else 120, **words))
    return t


def bos(t, *names, after=()):
    parts = [*names, "$A", *after]
    t.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=[(n, t.token_to_id(n)) for n in {*names, *after}])
    return t


def make(texts):
    """name -> Tokenizer"""
    out = {}
    llama2 = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama2_normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]

    t = train(texts, 560, normalizer=llama2_normalizer, pre=pre_tokenizers.Metaspace(), specials=special + BYTES, byte_fallback=True,
              fuse_unk=True, unk_token="<unk>")
    t.pre_tokenizer = None
    t.decoder = llama2
    out["llama2"] = bos(t, "<s>")

    for scheme, cut in (("first", False), ("always", True), ("never", True)):
        t = train(texts, 520, pre=pre_tokenizers.Metaspace(prepend_scheme=scheme), specials=special + BYTES, byte_fallback=True,
                  fuse_unk=True, unk_token="<unk>")
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=cut)
        t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
        t.add_tokens([AddedToken("[NOTE]", normalized=False), AddedToken("the theory", normalized=True)])
        out["metaspace_" + scheme] = bos(t, "<s>", after=["</s>"])

    t = train(texts, 330, pre=pre_tokenizers.Metaspace(), normalizer=normalizers.NFKC(), specials=special, unk_token="<unk>")
    t.decoder = decoders.Metaspace()
    out["unknown"] = t

    t = train(texts, 330, pre=pre_tokenizers.Metaspace(), specials=special, unk_token="<unk>", fuse_unk=True)
    t.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace(Regex(r"\s+"), " ")])
    t.decoder = decoders.Metaspace()
    out["unknown_fused"] = t

    for name, pattern, normalizer in (("llama3", LLAMA3, None), ("qwen2", QWEN2, normalizers.NFC()), ("gpt4", GPT4, None),
                                      ("gpt4o", GPT4O, normalizers.NFKD()), ("deepseek", DEEPSEEK, None)):
        pre = pre_tokenizers.Sequence([split(pattern), byte_level()])
        if name == "deepseek":
            pre = pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(pattern), byte_level()])
        t = train(texts, 380, pre=pre, normalizer=normalizer, specials=["<|begin|>", "<|end|>"], alphabet=ALPHABET)
        t.decoder = decoders.ByteLevel()
        if name == "llama3":
            t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos(t, "<|begin|>").post_processor])
        out[name] = t

    t = train(texts, 380, pre=byte_level(add_prefix_space=True, use_regex=True), specials=["<|endoftext|>"], alphabet=ALPHABET)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel()
    out["gpt2"] = t

    # Every setting of an added token, in normalized and in raw text.
    t = train(texts, 380, pre=byte_level(use_regex=True), specials=["<s>", "<pad>"], alphabet=ALPHABET)
    t.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    t.decoder = decoders.ByteLevel()
    t.add_tokens([AddedToken("[L]", lstrip=True, normalized=False), AddedToken("[R]", rstrip=True, normalized=False),
                  AddedToken("[LR]", lstrip=True, rstrip=True, normalized=False), AddedToken("Ångström", normalized=True),
                  AddedToken("of", single_word=True, normalized=True), AddedToken("<|x", normalized=False),
                  AddedToken("<|x|>", normalized=False), AddedToken(" can", normalized=False), AddedToken("word", single_word=True, normalized=False),
                  AddedToken("\n\n", normalized=False, rstrip=True), AddedToken("ALL", single_word=True, lstrip=True, rstrip=True)])
    t.add_special_tokens([AddedToken("<sp>", lstrip=True), AddedToken("<nsp>", special=True, normalized=True, rstrip=True)])
    out["added"] = bos(t, "<s>", after=["<pad>"])

    t = train(texts, 420, pre=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]),
              specials=["<unk>"], unk_token="<unk>", continuing_subword_prefix="##")
    out["prefix"] = t  # no decoder: tokens between spaces

    t = train(texts, 420, pre=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("contiguous"),
                                                       pre_tokenizers.Digits()]), specials=["<unk>"], unk_token="<unk>", end_of_word_suffix="</w>")
    t.normalizer = normalizers.Lowercase()
    t.decoder = decoders.Replace("</w>", " ")
    out["suffix"] = t

    # Splits that are not last, and every behaviour of a split; the words are told apart by how the model merges within them.
    base = train(texts, 330, pre=byte_level(use_regex=True), alphabet=ALPHABET)
    behaviours = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]
    for i, behaviour in enumerate(behaviours):
        t = Tokenizer.from_str(base.to_str())
        t.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"[aeiou]|\d+\b|\W$"), behaviour, i % 2 == 1), pre_tokenizers.Split("th", behaviours[(i + 2) % 5], False),
            pre_tokenizers.Punctuation(behaviours[(i + 1) % 5]), byte_level(add_prefix_space=i == 3), split("Ġ.", behaviours[(i + 3) % 5])])
        t.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("e", 2, int(i == 0)), decoders.Replace(Regex(r"\s+"), " ")])
        out["split_" + behaviour] = t
    return out


def texts_of(corpus):
    return [json.loads(line)["text"] for line in open(corpus)]


def specials_of(t):
    return sorted({a.content for a in t.get_added_tokens_decoder().values() if not a.content.startswith("<0x")} | {"<0x41>"})


def expected(t, text):
    ids = t.encode(text).ids
    plain = t.encode(text, add_special_tokens=False).ids
    return {"text": text, "ids": ids, "plain": plain, "decoded": t.decode(ids, skip_special_tokens=False),
            "skipped": t.decode(ids, skip_special_tokens=True)}


def main(corpus, out):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = [x[:4000] for x in texts_of(corpus)] + WORDS * 3
    r = random.Random(3)
    for i, (name, t) in enumerate(make(texts).items()):
        d = json.loads(t.to_str())
        if i % 2 == 0 and "prefix" not in name:  # merges as strings in half of the files
            d["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in d["model"]["merges"]]
        if name == "metaspace_always":  # the older spelling
            for part in (d["pre_tokenizer"], d["decoder"]["decoders"][1]):
                del part["prepend_scheme"]
                part["add_prefix_space"] = True
        s = json.dumps(d, ensure_ascii=False, separators=(",", ":"))
        (out / f"{name}.json").write_text(s)
        t = Tokenizer.from_str(s)
        special = specials_of(t)
        lines = ["", " ", "  the  theory of ", "Hello world", "the" + "".join(special), " " + " ".join(special) + " x"]
        lines += [w for w in WORDS if i % 3 == 0] + [random_text(r, special) for _ in range(34)]
        with open(out / f"{name}.jsonl", "w") as f:
            for line in lines:
                try:
                    want = expected(t, line)
                except BaseException as e:  # the reference's Strip panics when it is to strip the end of an empty text
                    if type(e).__name__ != "PanicException":
                        raise
                    continue
                f.write(json.dumps(want, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
