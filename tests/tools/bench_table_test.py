#!/usr/bin/env python3
"""tools/bench_table.py: of each thing the last line counts, ours and the peer's meet, and only what is between the marks changes."""
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("bench_table", root / "tools/bench_table.py")
bench_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_table)

sizes = {"gate": "softplus", "N": 1, "T_per_sequence": 8192, "H": 20, "K": 128, "V": 128}
time = lambda ms: {"ms_p10": ms * 0.9, "ms_p50": ms, "ms_p90": ms * 1.1}
head = {"op": "kda_forward", "device": "Some GPU", "commit": "abc"}
lines = [
    head | sizes | time(0.75) | {"limit_ms": 0.07, "error_o": 2e-3, "error_state": 3e-4},
    head | sizes | time(0.5) | {"limit_ms": 0.07, "error_o": 2e-3, "error_state": 3e-4},
    {"by": "peer", "op": "kda_forward", "device": "Some GPU"} | sizes | time(1.5),
    {"op": "kda_decode", "device": "Some GPU", "commit": "def", "N": 64, "H": 20, "K": 128, "V": 128, "state_tb_s": 2.5,
     "share": 0.83} | time(0.067),
]
text = bench_table.document(lines)
failed = []
for want in ("| 0.5 (0.45 .. 0.55) |", "| 1.5 (1.35 .. 1.65) | 3 x |", "Some GPU; commit def", "| 64 | 67 | 2.5 | 0.83 | - | - |"):
    if want not in text:
        failed.append(f"not there: {want}")
if "0.75" in text:
    failed.append("an older line is there")
with tempfile.TemporaryDirectory() as folder:
    results, doc = Path(folder, "r.jsonl"), Path(folder, "d.md")
    results.write_text("".join(json.dumps(x) + "\n" for x in lines))
    doc.write_text(f"before\n{bench_table.BEGIN}\nold\n{bench_table.END}\nafter\n")
    sys.argv = ["bench_table.py", str(results), "--into", str(doc)]
    bench_table.main()
    new = doc.read_text()
    if not (new.startswith("before\n") and new.endswith("after\n") and "old" not in new and "0.5 (0.45" in new):
        failed.append("the document was not renewed between its marks")
print("\n".join(failed) or "bench_table: all as expected")
sys.exit(bool(failed))
