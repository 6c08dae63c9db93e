"""The page's style sheet and its one script. The page is whole without the script."""

from __future__ import annotations

import base64
import hashlib

CSS = """
:root { color-scheme: light dark;
  --paper: #fdfcf9; --card: #ffffff; --ink: #20262c; --muted: #66707a; --grid: #e4e3de; --accent: #2563c9;
  --s0: #2563c9; --s1: #d4581a; --s2: #158a68; --s3: #8647bd; --s4: #a87b00; --s5: #c53467; --s6: #0b86a8;
  --s7: #6c737a;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Liberation Serif", Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1a1e22; --ink: #e4e7e9; --muted: #98a2ab; --grid: #2f363c; --accent: #7fb0ff;
  --s0: #72a9ff; --s1: #ff9a62; --s2: #4ecca3; --s3: #c59af2; --s4: #e2bb4b; --s5: #ff7fa6; --s6: #58c7e6;
  --s7: #a9b1b8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 var(--sans); }
h1, h2, h3 { font-family: var(--serif); font-weight: 600;
  line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 2.4rem; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.5rem; margin: 3.2rem 0 .3rem; }
h3 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p { margin: .4rem 0 1rem; max-width: 42rem; }
a { color: var(--accent); }
.eyebrow { margin: 0 0 .5rem; color: var(--muted); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; }
.lead, .note { color: var(--muted); }
.note { font-size: .9rem; }
nav { margin: 1.2rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1px; margin: 1.8rem 0 0; padding: 0;
  background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; overflow: hidden; }
.tiles div { padding: .85rem 1rem .75rem; box-shadow: 0 0 0 1px var(--grid); }
.tiles dt { color: var(--muted); font-size: .8rem; }
.tiles dd { margin: .1rem 0 0; font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles dd + dd { font-size: .8rem; color: var(--muted); letter-spacing: 0; line-height: 1.4; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.6rem 1.4rem; margin-top: 1.2rem; }
.plots > .wide { grid-column: 1 / -1; }
figure { margin: 0; break-inside: avoid; }
figure h3 { margin: 0; font: 600 .95rem/1.3 var(--sans); }
figcaption { color: var(--muted); font-size: .82rem; line-height: 1.45; margin-top: .1rem; }
.drawing { overflow-x: auto; margin-top: .35rem; }
svg { display: block; width: 100%; height: auto; font-family: var(--sans); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .8rem 0 0; padding: 0; list-style: none;
  font-size: .9rem; }
.key svg { display: inline-block; width: 1.7rem; vertical-align: middle; margin-right: .45rem; }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .82rem; color: var(--muted); margin: .8rem 0 0; }
.scale i { flex: 0 1 16rem; height: .7rem; border: 1px solid var(--grid); border-radius: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
td { overflow-wrap: anywhere; }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap; padding: .4rem 0 .4rem .8rem; }
.numbers { font-size: .84rem; }
.numbers td.best { font-weight: 650; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible, summary:focus-visible, input:focus-visible, a:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
details { border-top: 1px solid var(--grid); }
details:last-of-type { border-bottom: 1px solid var(--grid); }
summary { cursor: pointer; padding: .5rem 0; font-variant-numeric: tabular-nums; }
.slide { display: flex; align-items: center; gap: 1rem; margin: .6rem 0 1rem; font-size: .9rem; }
.slide input { flex: 1; accent-color: var(--accent); }
.slide output { min-width: 8rem; font-variant-numeric: tabular-nums; }
blockquote { margin: 0 0 1rem; padding: .1rem 0 .1rem 1rem; border-left: 3px solid var(--grid);
  white-space: pre-wrap; overflow-wrap: anywhere; font-family: var(--serif); }
blockquote b { color: var(--accent); font-weight: 600; }
pre { margin: .3rem 0 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--grid); border-radius: .5rem;
  overflow-x: auto; font: .8rem/1.5 var(--mono); tab-size: 2; }
code { font: .86em var(--mono); }
footer { margin-top: 4rem; color: var(--muted); font-size: .82rem; }
@media (max-width: 42rem) { body { padding: 1.6rem 1rem 3rem; } h1 { font-size: 1.9rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .plots { grid-template-columns: minmax(0, 1fr); } .wide .drawing svg { width: 38rem; } }
@media print { :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #111; --muted: #555; --grid: #d8d8d8;
    --accent: #1d4fa3; --s0: #2563c9; --s1: #d4581a; --s2: #158a68; --s3: #8647bd; --s4: #a87b00; --s5: #c53467;
    --s6: #0b86a8; --s7: #6c737a; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } nav, .slide { display: none; }
  h2, h3, summary { break-after: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  pre { white-space: pre-wrap; } .drawing, .scroll { overflow: visible; } .wide .drawing svg { width: 100%; } }
"""

SCRIPT = """
for (const box of document.querySelectorAll(".samples")) {
  const steps = [...box.querySelectorAll("details")];
  if (steps.length < 3) continue;
  const [bar, slider, said] = ["div", "input", "output"].map(name => document.createElement(name));
  bar.className = "slide";
  slider.type = "range"; slider.min = 0; slider.max = steps.length - 1; slider.value = steps.length - 1;
  slider.setAttribute("aria-label", "Step of the samples");
  const show = () => {
    steps.forEach((each, i) => { each.open = i == slider.value; each.hidden = i != slider.value; });
    said.textContent = steps[slider.value].querySelector("summary").textContent;
  };
  slider.addEventListener("input", show);
  bar.append(slider, said);
  box.prepend(bar);
  show();
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") != "ascending";
      heads.forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = (a, b) => {
        const x = key(a, i), y = key(b, i);
        if (x === "" || y === "") return (x === "") - (y === "");
        return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open]):not([hidden])")];
  closed.forEach(each => each.open = true);
});
addEventListener("afterprint", () => closed.forEach(each => each.open = false));
"""


def policy() -> str:
    """What the page may do: nothing from outside, no script but this one, whatever text a run holds."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
