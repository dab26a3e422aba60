#!/usr/bin/env python3
"""Holds the source tree to docs/ARCHITECTURE.md: who may include whom, sizes of files, who may print, exit, read the
environment. Run by the test `layers`; `check_layers.py ROOT` prints every breach and exits 1 if there is one."""
import pathlib
import re
import sys

SOURCES = {".h", ".cc", ".cu", ".cuh"}
SIZED = SOURCES | {".py", ".sh", ".cmake", ".txt"}
SIZED_FOLDERS = ("src", "tests", "bench", "tools", "examples", "cmake")
DATA = {"golden", "data"}  # folders of tests/ that hold no code
LIMIT = 800

CUDA_HEADER = re.compile(r"(cu(da|blas|rand|dnn)|nccl)")
# name, what finds it in a line without comments and strings, and the files of src/ where it is allowed
CALLS = [
    ("prints", re.compile(r"std::(cout|cerr|clog)\b|\bv?f?printf\s*\(|\bf?put(s|char|c)\s*\(|\bfmt::print\b|\bspdlog\b"),
     re.compile(r"(cli|server)/")),
    ("ends the process", re.compile(r"(?<![\w.>])(?:_|quick_|_E)?[eE]xit\s*\(|\babort\s*\(|\bstd::terminate\b"),
     re.compile(r"cli/main\b")),
    ("reads the environment", re.compile(r"\b(secure_)?getenv\b|\benviron\b"), re.compile(r"cli/options")),
]


def table(document):
    """{folder: set of folders it may include}, or None for one that may include everything; from the Markdown table."""
    rules, inside = {}, False
    for line in document.read_text().splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "folder":
            inside = True
        elif inside and not set(line) <= set("|-: "):
            rules[cells[0]] = {"nothing": set(), "everything": None}.get(cells[-1], set(cells[-1].split()))
    for folder, allowed in rules.items():
        unknown = (allowed or set()) - set(rules)
        if unknown:
            raise SystemExit(f"{document}: {folder} may include unknown folders {sorted(unknown)}")
    if not rules:
        raise SystemExit(f"{document}: no table that begins with a column `folder`")
    return rules


def code_only(text):
    """The text with comments and the insides of literals blanked, line breaks kept."""
    token = re.compile(r'R"(\w*)\(.*?\)\1"|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<!\w)\'(?:\\.|[^\'\\\n])+\'', re.S)
    return token.sub(lambda m: "\n" * m[0].count("\n"), text)


def check_includes(name, text, rules):
    """Breaches of one file under src/, tests/ or bench/; `name` is its path from the root."""
    parts = name.split("/")
    here = parts[1] if parts[0] == "src" and len(parts) > 2 else None
    if parts[0] == "src" and here not in rules:
        yield f"{name}: src/{parts[1]} is not in the table"
        return
    allowed = rules[here] if here else None
    backend = re.match(r"src/kernels/(cpu|cuda)/", name)
    for n, line in enumerate(text.splitlines(), 1):
        m = re.match(r'\s*#\s*include(?:_next)?\s*([<"])([^>"]+)[>"]', line)
        if not m:
            continue
        quoted, header = m[1] == '"', m[2]
        to = header.split("/")[0]
        if quoted and here and (".." in header.split("/") or "/" not in header):
            yield f'{name}:{n}: "{header}": write includes from src/, as "folder/file.h"'
        if here and allowed is not None and to in rules and to != here and to not in allowed:
            yield f"{name}:{n}: {here}/ may not include {to}/ (may: {' '.join(sorted(allowed)) or 'nothing'})"
        if CUDA_HEADER.match(header) and not (name.startswith("src/kernels/cuda/") or parts[-1].startswith("nccl.")):
            yield f"{name}:{n}: {header} outside kernels/cuda breaks the build without CUDA"
        inner = re.match(r"kernels/(cpu|cuda)/", header)
        if inner and not (backend and backend[1] == inner[1]) and not re.match(r"(tests|bench)/kernels/", name):
            yield f"{name}:{n}: {header} belongs to one backend; include kernels/*.h"


def check_calls(name, text):
    if not name.startswith("src/"):
        return
    for n, line in enumerate(code_only(text).splitlines(), 1):
        for what, pattern, allowed in CALLS:
            if pattern.search(line) and not allowed.match(name[len("src/"):]):
                yield f"{name}:{n}: {what}: {line.strip()}"


def check(root):
    rules = table(root / "docs/ARCHITECTURE.md")
    bad, files = [], 0
    for folder in SIZED_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if not path.is_file() or path.suffix not in SIZED or DATA & set(name.split("/")[1:2]):
                continue
            files += 1
            text = path.read_text()
            lines = text.count("\n")
            if lines > LIMIT:
                bad.append(f"{name}: {lines} lines, limit {LIMIT}")
            if path.suffix in SOURCES:
                bad += check_includes(name, text, rules)
                bad += check_calls(name, text)
    return bad, files


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    bad, files = check(pathlib.Path(sys.argv[1]))
    print("\n".join(bad) or f"layers: {files} files hold to docs/ARCHITECTURE.md")
    if not files:
        raise SystemExit("no files found")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
