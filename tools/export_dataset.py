#!/usr/bin/env python3
"""Writes a Hugging Face data set (a folder of `save_to_disk`, a folder or file of Arrow or Parquet, or a name on the hub)
as JSON lines, which is what `kda distill` and `kda train` read:

    python3 tools/export_dataset.py FOLDER -o train.jsonl
    python3 tools/export_dataset.py owner/name --split train -o train.jsonl

Needs the package `datasets` (pip install datasets). Columns `text` or `input_ids` are written; --column names another one
that holds the text; --chat joins a column of messages with the tokenizer's own template (needs transformers)."""
import argparse
import glob
import json
import os
import sys


def open_rows(where, split, config):
    import datasets

    if not os.path.exists(where):
        return datasets.load_dataset(where, config, split=split or "train", streaming=True)
    if os.path.isdir(where):
        has = lambda name: os.path.exists(os.path.join(where, name))
        if has("dataset_dict.json") or has("state.json"):
            loaded = datasets.load_from_disk(where)
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded
            if split is None and len(loaded) == 1:
                split = next(iter(loaded))
            if split not in loaded:
                sys.exit(f"export_dataset: {where} has the splits {', '.join(loaded)}: name one with --split")
            return loaded[split]
        files = sorted(f for kind in ("parquet", "arrow") for f in glob.glob(f"{where}/**/*.{kind}", recursive=True))
    else:
        files = [where]
    kinds = {os.path.splitext(f)[1] for f in files}
    if kinds == {".parquet"}:
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if kinds == {".arrow"}:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(f) for f in files])
    sys.exit(f"export_dataset: {where}: no data set on disk, and no .parquet or .arrow files of one kind")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder, file, or owner/name on the hub")
    parser.add_argument("-o", "--output", required=True, help="JSON lines file to write")
    parser.add_argument("--split", help="for a data set of several splits")
    parser.add_argument("--config", help="configuration of a data set on the hub")
    parser.add_argument("--column", help="column that holds the text (default: text, else input_ids)")
    parser.add_argument("--chat", metavar="MODEL", help="join the column of messages with this model's chat template")
    parser.add_argument("--limit", type=int, help="write at most so many rows")
    options = parser.parse_args()

    template = None
    if options.chat:
        from transformers import AutoTokenizer

        template = AutoTokenizer.from_pretrained(options.chat)
    column, written, temporary = options.column, 0, options.output + ".tmp"
    with open(temporary, "w", encoding="utf-8") as out:
        for row in open_rows(options.dataset, options.split, options.config):
            if options.limit is not None and written >= options.limit:
                break
            if column is None:
                column = next((c for c in ("text", "input_ids", "messages") if c in row), None)
                if column is None or (column == "messages" and template is None):
                    os.unlink(temporary)
                    sys.exit(f"export_dataset: columns are {', '.join(row)}: name the text's with --column"
                             " (and for messages a model with --chat)")
            value = row[column]
            if template is not None:
                value = template.apply_chat_template(value, tokenize=False)
            key = "input_ids" if isinstance(value, list) else "text"
            out.write(json.dumps({key: list(value) if key == "input_ids" else value}, ensure_ascii=False) + "\n")
            written += 1
    os.replace(temporary, options.output)
    print(f"{options.output}: {written} rows of {column}", file=sys.stderr)


if __name__ == "__main__":
    main()
