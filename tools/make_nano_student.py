"""Makes assets/nano-student from a distilled student whose weights outside the mixers are still nano-teacher's.

Both folders share one file: model-00001-of-00002.safetensors holds what they have in common (embeddings, norms, MLP, head) and lies in
assets/nano-teacher, linked from assets/nano-student; model-00002-of-00002.safetensors holds each model's own mixers.

    python3 tools/make_nano_student.py DISTILLED_FOLDER      (needs numpy and safetensors)
"""
import json
import os
import shutil
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
from safetensors.numpy import load_file, save_file

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHARED, OWN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def load(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def write_index(folder, shared, own):
    total = sum(v.nbytes for part in (shared, own) for v in part.values())
    weight_map = {**dict.fromkeys(shared, SHARED), **dict.fromkeys(own, OWN)}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def main():
    source, teacher_folder, folder = Path(sys.argv[1]), ASSETS / "nano-teacher", ASSETS / "nano-student"
    teacher, student = load(teacher_folder), load(source)
    shared = {k: v for k, v in teacher.items() if "self_attn" not in k}
    for k, v in shared.items():
        if student[k].tobytes() != v.tobytes():
            sys.exit(f"{source}: {k} is not the teacher's any more: only mixers may be trained")
    folder.mkdir(exist_ok=True)
    meta = {"format": "pt"}
    save_file(shared, teacher_folder / SHARED, meta)
    for to, weights in ((teacher_folder, teacher), (folder, student)):
        own = {k: v for k, v in weights.items() if k not in shared}
        save_file(own, to / OWN, meta)
        write_index(to, shared, own)
    (teacher_folder / "model.safetensors").unlink(missing_ok=True)
    for name in ("config.json", "generation_config.json", "README.md", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    for name in (SHARED, "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        os.symlink(f"../nano-teacher/{name}", folder / name)


main()
