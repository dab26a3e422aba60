// eval/report_page.h — the page that report_page() fills in. It loads nothing: style, script and data are inside.
#pragma once

namespace kda {

inline constexpr const char* kReportPage = R"page(<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{title}}</title>
<style>
:root {
  color-scheme: light dark;
  --back: #fcfcfb; --card: #ffffff; --text: #1c1d1f; --dim: #666a70; --line: #e3e4e6; --grid: #eef0f2;
  --s0: #2a6fdb; --s1: #d9622b; --s2: #1a9c7b; --s3: #a44fc4; --s4: #b58900; --s5: #c2375c; --s6: #4d7c8a; --s7: #6b7a1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #17181a; --card: #1f2123; --text: #e8e9ea; --dim: #9aa0a6; --line: #34373b; --grid: #2a2d30;
    --s0: #6ea3f5; --s1: #f08a55; --s2: #4cc9a4; --s3: #c98be3; --s4: #d9b13b; --s5: #ef7896; --s6: #83b4c2; --s7: #aebd5a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1500px; margin: 0 auto; }
h1 { font-size: 1.3rem; margin: 0 0 1rem; }
h2 { font-size: 1rem; margin: 1.8rem 0 .6rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; max-width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.note { color: var(--dim); margin: .4rem 0; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; background: var(--dim); }
#controls { display: flex; gap: 1.2rem; flex-wrap: wrap; align-items: center; margin: 1.4rem 0 .4rem; color: var(--dim); }
#controls label { display: inline-flex; gap: .4rem; align-items: center; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .15rem .3rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem .8rem .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; position: relative; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
figcaption span { font-weight: 400; color: var(--dim); margin-left: .4rem; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--dim); font-size: 11px; font-family: inherit; }
.tick { stroke: var(--grid); } .stage { stroke: var(--dim); stroke-dasharray: 3 3; opacity: .7; } .event { stroke: var(--s5); }
.cursor { stroke: var(--dim); } path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.tip { position: absolute; pointer-events: none; z-index: 2; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  box-shadow: 0 2px 10px #0003; padding: .35rem .55rem; font-size: 12px; white-space: nowrap; display: none;
  font-variant-numeric: tabular-nums; max-height: 320px; overflow: hidden; }
.tip b { font-weight: 600; } .tip div { display: flex; justify-content: space-between; gap: .9rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; font-size: 12px; }
</style>
</head>
<body>
<main>
<h1>{{title}}</h1>
{{summary}}
<div id="controls">
<label>over <select id="axis"><option value="tokens">tokens</option><option value="step">steps</option><option value="seconds">time</option></select></label>
<label><input type="checkbox" id="log" checked> logarithmic where a curve falls tenfold</label>
<label>smooth training curves <select id="smooth"><option value="1">not</option><option value="10">over 10 points</option><option value="50">over 50 points</option></select></label>
<span>lines: training; dots: held-out</span>
</div>
<noscript><p class="note">The pictures need JavaScript; the tables do not.</p></noscript>
<div id="charts"></div>
<h2>Events</h2>
{{events}}
{{run_files}}
</main>
<script id="data" type="application/json">{{data}}</script>
<script>
"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const W = 480, H = 250, LEFT = 56, RIGHT = 12, TOP = 14, BOTTOM = 26;
const make = (tag, attributes, parent) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (parent) parent.append(e);
  return e;
};
const html = (tag, className, parent, text) => {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  if (parent) parent.append(e);
  return e;
};
const runColor = i => `var(--s${i % 8})`;
for (const e of document.querySelectorAll(".swatch")) e.style.background = runColor(+e.dataset.run);

function short(v) {
  const a = Math.abs(v);
  if (a >= 1e9) return +(v / 1e9).toPrecision(3) + "G";
  if (a >= 1e6) return +(v / 1e6).toPrecision(3) + "M";
  if (a >= 1e4) return +(v / 1e3).toPrecision(3) + "k";
  if (a !== 0 && a < 1e-3) return v.toExponential(a < 1e-99 ? 0 : 1).replace(".0e", "e");
  return String(+v.toPrecision(4));
}
function clock(s) {
  const pad = n => String(n).padStart(2, "0"), t = Math.round(s);
  const h = Math.floor(t / 3600), m = Math.floor(t / 60) % 60;
  return h ? `${h}:${pad(m)}:${pad(t % 60)}` : `${m}:${pad(t % 60)}`;
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw)), part = raw / power;
  const step = (part < 1.5 ? 1 : part < 3.5 ? 2 : part < 7.5 ? 5 : 10) * power, out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; ++i) out.push(i * step);
  return out;
}
function logTicks(low, high) {
  const out = [], decades = Math.log10(high / low), parts = decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 3 ? [1, 2, 5] : [1];
  const each = Math.max(1, Math.ceil(decades / 7));
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += each)
    for (const p of parts) if (p * 10 ** e >= low * (1 - 1e-9) && p * 10 ** e <= high * (1 + 1e-9)) out.push(p * 10 ** e);
  return out;
}
// Mean of the last n points that have a value; gaps stay.
function smoothed(ys, n) {
  if (n <= 1) return ys;
  const kept = [];
  let sum = 0;
  return ys.map(y => {
    if (y === null) return null;
    kept.push(y);
    sum += y;
    if (kept.length > n) sum -= kept[kept.length - n - 1];
    return sum / Math.min(kept.length, n);
  });
}

// series: {label, color, xs, ys, dots, stage}; draws one picture with its legend and values under the pointer.
function chart(parent, title, unit, series, marks, settings) {
  series = series.filter(s => s.ys.some(y => y !== null));
  if (!series.length) return;
  const figure = html("figure", "", parent), caption = html("figcaption", "", figure, title);
  if (unit) html("span", "", caption, unit);
  const xAll = series.flatMap(s => s.xs.filter((x, i) => s.ys[i] !== null));
  const yAll = series.flatMap(s => s.ys.filter(y => y !== null));
  let x0 = Math.min(0, xAll.reduce((a, b) => Math.min(a, b))), x1 = xAll.reduce((a, b) => Math.max(a, b));
  if (x1 <= x0) x1 = x0 + 1;
  let y0 = yAll.reduce((a, b) => Math.min(a, b)), y1 = yAll.reduce((a, b) => Math.max(a, b));
  const log = settings.log && y0 > 0 && y1 / y0 >= 10;
  if (unit === "share") { y0 = Math.min(0, y0); y1 = Math.max(1, y1); }
  else if (!log) {
    if (y0 > 0 && y0 < 0.5 * y1) y0 = 0;
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
    y1 += room;
    if (y0 !== 0) y0 -= room;
  }
  const f = log ? Math.log10 : v => v, low = f(y0), span = f(y1) - low || 1;
  const X = x => LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT);
  const Y = y => H - BOTTOM - (f(y) - low) / span * (H - TOP - BOTTOM);
  const svg = make("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} over ${settings.axis}`}, figure);
  for (const t of log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    make("line", {class: "tick", x1: LEFT, x2: W - RIGHT, y1: Y(t), y2: Y(t)}, svg);
    make("text", {x: LEFT - 6, y: Y(t) + 4, "text-anchor": "end"}, svg).textContent = short(t);
  }
  for (const t of ticks(x0, x1, 5))
    make("text", {x: X(t), y: H - 8, "text-anchor": X(t) > W - 30 ? "end" : "middle"}, svg).textContent = settings.axis === "seconds" ? clock(t) : short(t);
  let stageEnd = -1;  // where the last stage's name ends, so that names do not lie over each other
  for (const m of marks) {
    if (m.x < x0 || m.x > x1) continue;
    const line = make("line", {class: m.kind, x1: X(m.x), x2: X(m.x), y1: TOP, y2: m.kind === "event" ? TOP + 8 : H - BOTTOM}, svg);
    make("title", {}, line).textContent = m.label;
    if (m.kind === "stage" && X(m.x) > stageEnd) {
      make("text", {x: X(m.x) + 3, y: TOP - 3}, svg).textContent = m.label;
      stageEnd = X(m.x) + 3 + m.label.length * 6.5;
    }
  }
  for (const s of series) {
    let d = "", pen = false;
    s.xs.forEach((x, i) => {
      if (s.ys[i] === null) { pen = pen && s.dots; return; }  // not every evaluation measures everything
      if (s.apart && i > 0 && s.stage[i] !== s.stage[i - 1]) pen = false;  // another stage, another loss
      d += `${pen ? "L" : "M"}${X(x).toFixed(1)} ${Y(s.ys[i]).toFixed(1)}`;
      pen = true;
    });
    make("path", {d, style: `stroke:${s.color}`, "stroke-width": s.dots ? 1.2 : 1.6, "stroke-opacity": s.dots ? 0.8 : s.faint ? 0.65 : 1}, svg);
    s.xs.forEach((x, i) => {
      const alone = s.ys[i] !== null && (i === 0 || s.ys[i - 1] === null) && (i + 1 >= s.ys.length || s.ys[i + 1] === null);
      if (s.ys[i] !== null && (s.dots || alone))
        make("circle", {cx: X(x).toFixed(1), cy: Y(s.ys[i]).toFixed(1), r: s.xs.length > 100 ? 1.8 : 2.8, style: `fill:${s.color}`}, svg);
    });
  }
  const cursor = make("line", {class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden"}, svg);
  const tip = html("div", "tip", figure);
  const leave = () => { tip.style.display = "none"; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * W;
    let best = null;
    for (const x of xAll) if (best === null || Math.abs(X(x) - px) < Math.abs(X(best) - px)) best = x;
    if (best === null) return leave();
    cursor.setAttribute("x1", X(best));
    cursor.setAttribute("x2", X(best));
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    html("b", "", tip, settings.axis === "seconds" ? clock(best) : `${best.toLocaleString("en")} ${settings.axis === "step" ? "steps" : "tokens"}`);
    for (const s of series) {
      let at = -1;
      s.xs.forEach((x, i) => { if (s.ys[i] !== null && (at < 0 || Math.abs(x - best) < Math.abs(s.xs[at] - best))) at = i; });
      if (at < 0 || Math.abs(X(s.xs[at]) - X(best)) > 12) continue;
      const row = html("div", "", tip), name = html("span", "", row);
      html("span", "swatch", name).style.background = s.color;
      name.append(s.label + (s.dots ? ", held-out" : ""));
      html("span", "", row, String(+s.ys[at].toPrecision(5)));
    }
    tip.style.display = "block";
    const left = event.clientX - figure.getBoundingClientRect().left;
    tip.style.left = `${Math.max(4, Math.min(left + 14, figure.clientWidth - tip.offsetWidth - 6))}px`;
    tip.style.top = `${Math.min(event.clientY - figure.getBoundingClientRect().top + 14, 150)}px`;
  });
}

function draw() {
  const settings = {axis: document.getElementById("axis").value, log: document.getElementById("log").checked};
  const smooth = +document.getElementById("smooth").value;
  const charts = document.getElementById("charts");
  charts.replaceChildren();
  const section = title => { const e = html("div", "grid"); charts.append(html("h2", "", null, title), e); return e; };
  const marksOf = run => {
    const marks = [], {stage, step} = run.train, xs = run.train[settings.axis];
    stage.forEach((name, i) => { if (name && (i === 0 || name !== stage[i - 1])) marks.push({kind: "stage", x: i ? xs[i] : 0, label: name}); });
    for (const e of run.events) {
      let at = step.findIndex(s => s >= e.step);
      if (at < 0) at = step.length - 1;
      if (at >= 0) marks.push({kind: "event", x: xs[at], label: `${e.what} at step ${e.step}`});
    }
    return marks;
  };
  const marks = runs.length === 1 ? marksOf(runs[0]) : runs.flatMap(marksOf).filter(m => m.kind === "event");
  const pair = key => runs.flatMap((run, i) => ["train", "eval"].filter(kind => run[kind].series[key]).map(kind => ({
    label: runs.length > 1 ? run.name : key.split(".").pop(),
    color: runs.length > 1 || kind === "train" ? runColor(i) : runColor(1), faint: kind === "train" && runs.length > 1,
    xs: run[kind][settings.axis], stage: run[kind].stage, dots: kind === "eval",
    apart: kind === "train" || key === "loss",
    ys: kind === "train" ? smoothed(run.train.series[key], smooth) : run.eval.series[key]})));
  const keys = start => [...new Set(runs.flatMap(r => [...Object.keys(r.train.series), ...Object.keys(r.eval.series)]))].filter(k => k.startsWith(start)).sort();
  const unitOf = {lr: "", grad_norm: "", tok_per_s: "tokens a second", loss: "weighted mean of the terms", top1: "share"};
  const losses = section("Losses");
  for (const key of ["loss", ...keys("terms.")]) chart(losses, key.replace("terms.", ""), unitOf[key] || "", pair(key), marks, settings);
  if (keys("probes.").length || keys("top1").length) {
    const scores = section("Scores on held-out text and questions");
    for (const key of [...keys("top1"), ...keys("probes.")])
      chart(scores, key === "top1" ? "top-1 agreement" : key.replace("probes.", ""), "share", pair(key), marks, {...settings, log: false});
  }
  const course = section("Course");
  for (const [key, title] of [["lr", "learning rate"], ["grad_norm", "gradient norm"], ["tok_per_s", "throughput"]])
    chart(course, title, unitOf[key], pair(key), marks, {...settings, log: settings.log && key === "grad_norm"});
  if (runs.some(r => Object.keys(r.train.layers).length + Object.keys(r.eval.layers).length)) {
    const layers = section("Losses by layer");
    runs.forEach(run => {
      for (const kind of ["train", "eval"])
        for (const term in run[kind].layers) {
          const list = run[kind].layers[term], last = Math.max(list.length - 1, 1);
          chart(layers, runs.length > 1 ? `${term}, ${run.name}` : term, `${kind === "eval" ? "held-out, " : ""}first layer blue, last red`,
                list.map((ys, l) => ({label: `${l}`, color: `hsl(${220 + 140 * l / last} 70% 55%)`, xs: run[kind][settings.axis],
                                      stage: run[kind].stage, dots: kind === "eval", apart: kind === "train", ys: kind === "train" ? smoothed(ys, smooth) : ys})),
                marksOf(run), settings);
        }
    });
  }
}
for (const id of ["axis", "log", "smooth"]) document.getElementById(id).addEventListener("change", draw);
draw();
</script>
</body>
</html>
)page";

}  // namespace kda
