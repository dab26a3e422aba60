#!/usr/bin/env python3
"""Tables of measurements, in Markdown, from the lines of bench/results/DEVICE.jsonl: of each thing the last line.

    python tools/bench_table.py bench/results/nvidia-h100-80gb-hbm3.jsonl            to standard output
    python tools/bench_table.py FILE --into docs/CUDA.md                             between its two marks
"""
import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- made by tools/bench_table.py: begin -->", "<!-- made by tools/bench_table.py: end -->"


def table(head, rows):
    if not rows:
        return ""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in cells) + "\n"


def number(x, digits=3):
    if x is None:
        return "-"
    if isinstance(x, str):
        return x
    if x and abs(x) < 1e-2:
        return f"{x:.1e}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def spread(line):
    """Median, and the tenth and ninetieth percentile behind it."""
    if line is None or line.get("ms_p50") is None:
        return "-"
    return f"{number(line['ms_p50'])} ({number(line['ms_p10'])} .. {number(line['ms_p90'])})"


def last(lines, op, keys, by=None):
    """The last line of each combination of `keys`, in order of first appearance."""
    out = {}
    for line in lines:
        if line.get("op") == op and (line.get("by") == by):
            out[tuple(line.get(k) for k in keys)] = line
    return out


def forward(lines):
    keys = ("gate", "N", "T_per_sequence", "H", "K", "V")
    ours, peer = last(lines, "kda_forward", keys), last(lines, "kda_forward", keys, "peer")
    rows = [[k[0], f"{k[1]} x {k[2]}", f"{k[3]}, {k[4]}, {k[5]}", spread(x), number(x.get("limit_ms")),
             spread(peer.get(k)), number(peer[k]["ms_p50"] / x["ms_p50"], 2) + " x" if k in peer else "-",
             number(x.get("error_o")), number(x.get("error_state"))] for k, x in ours.items()]
    return table(["gate", "sequences", "H, K, V", "ms, median (10 % .. 90 %)", "floor, ms", "fla, ms", "faster",
                  "error of o", "of the state"], rows)


def errors(lines):
    keys = ("case", "form")
    ours, peer = last(lines, "kda_error", keys), last(lines, "kda_error", keys, "peer")
    pair = lambda x: "failed" if x and "failed" in x else "-" if x is None else f"{number(x['error_o'])} / {number(x['error_state'])}"
    return table(["case", "o / state", "fla"], [[k[0], pair(x), pair(peer.get(k))] for k, x in ours.items()])


def step(lines):
    ours = last(lines, "kda_decode", ("N", "H", "K", "V"))
    peer = last([x for x in lines if x.get("form") == "in_place"], "kda_decode", ("N", "H", "K", "V"), "peer")
    us = lambda x: "-" if x is None else number(x["ms_p50"] * 1e3)
    return table(["sequences", "us a layer", "state, TB/s", "of a copy", "fla, us", "fla, TB/s"],
                 [[k[0], us(x), number(x["state_tb_s"]), number(x["share"], 2), us(peer.get(k)),
                   number(peer[k]["state_tb_s"]) if k in peer else "-"] for k, x in ours.items()])


def decode(lines):
    rows = [[k[0], k[1], k[2], k[3], spread(x), number(x["tok_per_s"]), number(x["share"], 2), number(x["share_with_state"], 2),
             number(x["device_bytes"] / 1e9)]
            for k, x in last(lines, "decode", ("model", "weights", "batch", "context")).items()]
    return table(["model", "weights", "batch", "context", "ms a step", "tok/s", "weights / read rate", "with states",
                  "device GB"], rows)


def prefill(lines):
    rows = [[k[0], k[1], f"{k[2]} x {k[3]}", spread(x), number(x["tok_per_s"]), number(x["share"], 2),
             number(x["device_bytes"] / 1e9), number(x["device_bytes_above_loaded"] / 1e9)]
            for k, x in last(lines, "prefill", ("model", "weights", "sequences", "tokens")).items()]
    return table(["model", "weights", "prompts", "ms", "tok/s", "of the products' rate", "device GB", "above the loaded model"],
                 rows)


def load(lines):
    rows = [[k[0], k[1], number(x["load_ms"] / 1e3), number(x["first_token_ms"] / 1e3), number(x["bytes_per_s"] / 1e9),
             number(min(x["file_read_bytes_per_s"], x["pinned_copy_bytes_per_s"]) / 1e9), x["limit"], number(x["share"], 2)]
            for k, x in last(lines, "load", ("model", "weights")).items()]
    return table(["model", "weights", "loaded after s", "first token after s", "GB/s", "limit, GB/s", "which is", "share"], rows)


def limits(lines):
    rows = [[number(x["read_bytes_per_s"] / 1e12), number(x["copy_bytes_per_s"] / 1e12), number(x["gemm_flops_per_s"] / 1e12)]
            for x in last(lines, "limits", ()).values()]
    return table(["reading memory, TB/s", "copying it (read + written), TB/s", "bf16 product 8192^3, TFLOP/s"], rows)


def document(lines):
    parts = []
    for title, make in (("The card's limits, probed", limits), ("KDA forward", forward),
                        ("Relative L2 distance from the recurrence in double, bf16 inputs", errors),
                        ("Fused decode step, one layer", step), ("Generated tokens", decode), ("Prompts", prefill),
                        ("Loading", load)):
        text = make(lines)
        if text:
            parts.append(f"### {title}\n\n{text}")
    devices = sorted({x["device"] for x in lines if "device" in x})
    commits = [x["commit"] for x in lines if x.get("commit")]
    note = f"{', '.join(devices)}; commit {commits[-1]}.\n" if commits else ""
    return note + "\n" + "\n".join(parts)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results")
    p.add_argument("--into", help="a file with the two marks; the text between them is replaced")
    a = p.parse_args()
    text = document([json.loads(x) for x in Path(a.results).read_text().splitlines() if x.startswith("{")])
    if not a.into:
        return print(text, end="")
    old = Path(a.into).read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{a.into}: needs the lines {BEGIN} and {END}")
    Path(a.into).write_text(old[:old.index(BEGIN)] + BEGIN + "\n" + text + old[old.index(END):])


if __name__ == "__main__":
    main()
