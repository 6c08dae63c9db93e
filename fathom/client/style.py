"""How the page looks: Gradio's theme in Fathom's colours, the style sheet, the icon, and the routing view's script.

System fonts only, and nothing from another host. Light or dark is the reader's own setting.
"""

from __future__ import annotations

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")
PAPER, CARD, INK, MUTED, GRID, ACCENT = "#fdfcf9", "#ffffff", "#20262c", "#5f6972", "#e4e3de", "#2563c9"
DARK_PAPER, DARK_CARD, DARK_INK, DARK_MUTED, DARK_GRID, DARK_ACCENT = (
    "#14171a", "#1a1e22", "#e4e7e9", "#98a2ab", "#2f363c", "#7fb0ff",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """The report's paper and ink."""
    blue = gr.themes.Color(
        name="fathom", c50="#eff5fe", c100="#dbe8fc", c200="#bfd6fa", c300="#95bbf6", c400="#6497ef", c500="#4178e3",
        c600=ACCENT, c700="#1f52aa", c800="#1f4689", c900="#1e3d6e", c950="#162744",
    )  # fmt: skip
    made = gr.themes.Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue="stone",
        radius_size="md",
        font=list(SANS),
        font_mono=list(MONO),
    )
    return made.set(
        body_background_fill=PAPER,
        body_background_fill_dark=DARK_PAPER,
        body_text_color=INK,
        body_text_color_dark=DARK_INK,
        body_text_color_subdued=MUTED,
        body_text_color_subdued_dark=DARK_MUTED,
        background_fill_primary=CARD,
        background_fill_primary_dark=DARK_CARD,
        background_fill_secondary=PAPER,
        background_fill_secondary_dark=DARK_PAPER,
        border_color_primary=GRID,
        border_color_primary_dark=DARK_GRID,
        block_background_fill=CARD,
        block_background_fill_dark=DARK_CARD,
        block_border_color=GRID,
        block_border_color_dark=DARK_GRID,
        block_label_text_color=MUTED,
        block_label_text_color_dark=DARK_MUTED,
        block_title_text_color=INK,
        block_title_text_color_dark=DARK_INK,
        block_info_text_color=MUTED,
        block_info_text_color_dark=DARK_MUTED,
        input_background_fill=CARD,
        input_background_fill_dark=DARK_CARD,
        input_border_color=GRID,
        input_border_color_dark=DARK_GRID,
        button_primary_background_fill=ACCENT,
        button_primary_background_fill_dark="#2a62b8",
        button_primary_background_fill_hover="#1f52aa",
        button_primary_background_fill_hover_dark="#3572cc",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill=CARD,
        button_secondary_background_fill_dark=DARK_CARD,
        button_secondary_background_fill_hover=GRID,
        button_secondary_background_fill_hover_dark=DARK_GRID,
        button_secondary_border_color=GRID,
        button_secondary_border_color_dark=DARK_GRID,
        button_secondary_text_color=INK,
        button_secondary_text_color_dark=DARK_INK,
        slider_color=ACCENT,
        slider_color_dark=DARK_ACCENT,
        input_border_width="1px",
        checkbox_background_color_selected=ACCENT,
        checkbox_background_color_selected_dark="#2a62b8",
    )


ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#1f52aa"/>'
    '<g fill="#fff"><path d="M3 3h2v2H3zM7 7h2v2H7zM11 3h2v2h-2z"/><path d="M3 11h2v2H3zM7 3h2v2H7z" opacity=".45"/>'
    '<path d="M11 11h2v2h-2z" opacity=".75"/></g></svg>'
)

CSS = """
:root { --fx-ink: #20262c; --fx-muted: #5f6972; --fx-grid: #e4e3de; --fx-card: #ffffff; --fx-paper: #fdfcf9;
  --fx-accent: #2563c9; --fx-draft: #b8440b; --fx-draft-bed: #fbe6d8; --fx-good: #158a68; --fx-bad: #b3261e;
  --fx-bed: #f3f2ed; --fx-bad-bed: #fdf0ee; --fx-busy-bed: #fdf6e3;
  --fx-serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Liberation Serif", Georgia, serif;
  --fx-mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.dark { --fx-ink: #e4e7e9; --fx-muted: #98a2ab; --fx-grid: #2f363c; --fx-card: #1a1e22; --fx-paper: #14171a;
  --fx-accent: #7fb0ff; --fx-draft: #ffa877; --fx-draft-bed: #46301f; --fx-good: #4ecca3; --fx-bad: #ff9a8f;
  --fx-bed: #1e2328; --fx-bad-bed: #33201e; --fx-busy-bed: #302a18; }
.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
.gradio-container h1, .gradio-container h2 { font-family: var(--fx-serif); font-weight: 600; line-height: 1.2;
  color: var(--fx-ink); margin: 0; }
.gradio-container h2 { font-size: 1.35rem; margin: 1.2rem 0 .4rem; }
footer { display: none !important; }
.dark input[type=range] { --neutral-200: #3a424a; }

.html-container:has([class^=fx-]), .html-container:has(h2) { padding: 0 !important; }
.fx-header { display: flex; align-items: flex-end; justify-content: space-between; gap: 1rem; padding: .9rem 0 .2rem; }
.fx-header h1 { font-size: 2.1rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
.fx-eyebrow { margin: 0 0 .3rem; color: var(--fx-muted); font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; }
.fx-pill { display: inline-flex; align-items: center; gap: .5rem; padding: .3rem .8rem;
  border: 1px solid var(--fx-grid); border-radius: 2rem; background: var(--fx-card); color: var(--fx-ink);
  font-size: .85rem; white-space: nowrap; }
.fx-pill i { width: .6rem; height: .6rem; border-radius: 50%; background: var(--fx-muted); }
.fx-ready i { background: var(--fx-good); }
.fx-waiting i { background: none; border: 2px solid #b98900; }
.fx-away i, .fx-key i, .fx-failed i { border-radius: 1px; background: var(--fx-bad); }
.fx-notice { margin: .6rem 0 0; padding: .7rem 1rem; border-left: 3px solid var(--fx-bad); border-radius: .3rem;
  background: var(--fx-bad-bed); color: var(--fx-ink); font-size: .95rem; line-height: 1.5; }
.fx-notice.fx-is-busy { border-color: #b98900; background: var(--fx-busy-bed); }
.fx-notice p { margin: 0; overflow-wrap: anywhere; }
.fx-notice p + p { color: var(--fx-muted); }
.fx-notice p:empty { display: none; }
.fx-notice code { font: .9em var(--fx-mono); }
.fx-note, .fx-facts { color: var(--fx-muted); font-size: .9rem; margin: .2rem 0; font-variant-numeric: tabular-nums; }
.fx-facts { min-height: 1.4rem; }
.fx-busy-line::after { content: " …"; }

.fx-answer { min-height: 8.5rem; padding: 1rem 1.2rem; background: var(--fx-card); border: 1px solid var(--fx-grid);
  border-radius: .5rem; color: var(--fx-ink); font: 1.08rem/1.6 var(--fx-serif); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.fx-answer .fx-prompt { color: var(--fx-muted); }
.fx-caret { display: inline-block; width: .5ch; height: 1em; margin-left: 1px; vertical-align: -.12em;
  background: var(--fx-accent); animation: fx-blink 1s steps(2) infinite; }
@keyframes fx-blink { 50% { opacity: 0; } }

.fx-chat { display: flex; flex-direction: column; gap: .9rem; min-height: 12rem; padding: 1rem 1.2rem;
  background: var(--fx-card); border: 1px solid var(--fx-grid); border-radius: .5rem; color: var(--fx-ink); }
.fx-turn b { display: block; color: var(--fx-muted); font-size: .78rem; font-weight: 500; }
.fx-turn p { margin: .1rem 0 0; min-height: 1.6em; font: 1.05rem/1.6 var(--fx-serif); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.fx-turn.fx-you { border-left: 3px solid var(--fx-grid); padding-left: .8rem; }
.fx-turn.fx-model { border-left: 3px solid var(--fx-accent); padding-left: .8rem; }

.fx-card { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1px; margin: 0; overflow: hidden;
  background: var(--fx-card); border: 1px solid var(--fx-grid); border-radius: .5rem; }
.fx-card div { padding: .6rem .8rem; box-shadow: 0 0 0 1px var(--fx-grid); }
.fx-card dt { color: var(--fx-muted); font-size: .78rem; margin: 0; }
.fx-card dd { margin: 0; color: var(--fx-ink); font-size: 1.15rem; line-height: 1.35; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.fx-card dd + dd { color: var(--fx-muted); font-size: .78rem; }
.fx-card dd:empty { display: none; }

.fx-routing { position: relative; margin: 0; contain: inline-size; color: var(--fx-ink); }
.fx-routing figcaption { color: var(--fx-muted); font-size: .95rem; line-height: 1.5; margin-bottom: .5rem; }
.fx-legend { display: flex; flex-wrap: wrap; gap: .4rem 2rem; color: var(--fx-muted); font-size: .85rem; }
.fx-legend > span { display: inline-flex; align-items: center; gap: .5rem; }
.fx-scale b { display: inline-flex; border: 1px solid var(--fx-grid); }
.fx-scale i { width: 1.1rem; height: .75rem; background: var(--fx-accent); }
.fx-legend .fx-mark { width: 1.1rem; height: .28rem; background: var(--fx-draft); }
.fx-legend .fx-fair-mark { height: .9rem; border-left: 1.5px dashed var(--fx-muted); }
.fx-tokens { margin: .8rem 0; padding: .8rem 1rem; max-height: 11rem; overflow-y: auto; background: var(--fx-card);
  border: 1px solid var(--fx-grid); border-radius: .5rem; font: .98rem/1.9 var(--fx-serif); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.fx-t { padding: .12em 0; border-radius: 2px; box-shadow: inset -1px 0 var(--fx-grid); cursor: default; }
.fx-t.fx-draft { background: var(--fx-draft-bed); border-bottom: 2px solid var(--fx-draft); }
.fx-t.fx-on { outline: 2px solid var(--fx-accent); outline-offset: -1px; }
.fx-maps { display: grid; grid-template-columns: max-content max-content; max-height: 80vh; overflow: auto;
  background: var(--fx-card); border: 1px solid var(--fx-grid); border-radius: .5rem; padding: 0 1rem 1rem 0; }
.fx-maps:focus-visible { outline: 2px solid var(--fx-accent); outline-offset: 2px; }
.fx-maps svg { display: block; overflow: visible; }
.fx-corner, .fx-side { position: sticky; left: 0; z-index: 2; background: var(--fx-card); }
.fx-corner, .fx-head { position: sticky; top: 0; z-index: 1; background: var(--fx-card); }
.fx-corner { z-index: 3; }
.fx-corner span { position: absolute; right: 12px; bottom: 4px; width: 78px; color: var(--fx-muted);
  font-size: .72rem; }
.fx-side { padding-left: 1rem; box-sizing: content-box; }
.fx-corner { padding-left: 1rem; box-sizing: content-box; }
.fx-head text { font: 11px var(--fx-mono); fill: var(--fx-muted); }
.fx-head text.fx-draft { fill: var(--fx-draft); }
.fx-head .fx-mark { fill: var(--fx-draft); }
.fx-side text { font: 10px var(--fx-mono); fill: var(--fx-muted); text-anchor: end; }
.fx-side .fx-name { font: 600 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--fx-ink); text-anchor: start; }
.fx-bars { fill: var(--fx-accent); opacity: .55; }
.fx-fair { stroke: var(--fx-ink); stroke-width: 1; opacity: .5; stroke-dasharray: 3 2; }
.fx-bed { fill: var(--fx-bed); }
.fx-map path { fill: var(--fx-accent); }
.fx-w0 { opacity: .16; } .fx-w1 { opacity: .26; } .fx-w2 { opacity: .37; } .fx-w3 { opacity: .49; }
.fx-w4 { opacity: .61; } .fx-w5 { opacity: .74; } .fx-w6 { opacity: .87; } .fx-w7 { opacity: 1; }
.fx-cursor { fill: none; stroke: var(--fx-ink); stroke-width: 1.5; pointer-events: none; }
.fx-tip { position: absolute; z-index: 9; max-width: 24rem; padding: .6rem .8rem; background: var(--fx-card);
  border: 1px solid var(--fx-grid); border-radius: .4rem; box-shadow: 0 4px 18px rgb(0 0 0 / .18); pointer-events: none;
  font-size: .84rem; line-height: 1.45; font-variant-numeric: tabular-nums; }
.fx-tip[hidden] { display: none; }
.fx-tip b { font: 600 1rem var(--fx-mono); overflow-wrap: anywhere; }
.fx-tip small { display: block; color: var(--fx-muted); font-size: .78rem; margin-bottom: .3rem; }
.fx-tip table { border-collapse: collapse; }
.fx-tip th { font-weight: 500; text-align: left; padding: 0 .8rem 0 0; color: var(--fx-muted); white-space: nowrap;
  vertical-align: top; }
.fx-tip td { padding: 0; }
.fx-tip mark { background: var(--fx-accent); color: var(--fx-card); border-radius: 2px; padding: 0 .2em; }
@media (max-width: 40rem) { .fx-header h1 { font-size: 1.6rem; } }
@media (prefers-reduced-motion: reduce) { .fx-caret { animation: none; } }
"""

# Runs once for the component; what it holds is replaced whenever a drawing comes, so all events are caught at its root.
SCRIPT = """
let at = -1, follow = true, left = 0, known = null, data = null;
const find = name => element.querySelector(name);
function read() {
  const figure = find(".fx-routing");
  if (figure !== known) { known = figure; data = figure && JSON.parse(figure.dataset.routing); }
  return data;
}
function make(name, text, parent) {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}
function tell(i, under) {
  const box = find(".fx-tip"), [place, text, id, draft, layers] = data.tokens[i];
  box.replaceChildren();
  make("b", text || "(no text)", box);
  make("small", `token ${place}, id ${id}` + (draft ? ", proposed by MTP" : ""), box);
  const table = make("table", null, box);
  layers.forEach((told, l) => {
    if (!told) return;
    const row = make("tr", null, table), cell = (make("th", `layer ${data.layers[l][0]}`, row), make("td", null, row));
    told[0].map((expert, k) => [expert, told[1][k]]).sort((a, b) => b[1] - a[1]).forEach(([expert, weight], k) => {
      if (k) cell.append(", ");
      const here = under && under[0] === l && under[1] === expert;
      make(here ? "mark" : "span", `${expert} (${weight.toFixed(2)})`, cell);
    });
  });
  box.hidden = false;
  return box;
}
function show(i, x, y, under) {
  if (!read() || i < 0 || i >= data.tokens.length) return hide();
  at = i;
  element.querySelectorAll(".fx-on").forEach(each => each.classList.remove("fx-on"));
  element.querySelector(`.fx-t[data-i="${i}"]`)?.classList.add("fx-on");
  const cursor = find(".fx-cursor");
  cursor.setAttribute("x", i * data.column);
  cursor.setAttribute("visibility", "visible");
  const box = tell(i, under), frame = find(".fx-routing").getBoundingClientRect();
  const flip = x - frame.left + box.offsetWidth + 24 > frame.width;
  box.style.left = Math.max(0, x - frame.left + (flip ? -box.offsetWidth - 14 : 14)) + "px";
  box.style.top = Math.max(0, y - frame.top + 14) + "px";
}
function hide() {
  at = -1;
  const box = find(".fx-tip");
  if (!box) return;
  box.hidden = true;
  find(".fx-cursor").setAttribute("visibility", "hidden");
  element.querySelectorAll(".fx-on").forEach(each => each.classList.remove("fx-on"));
}
element.addEventListener("pointermove", event => {
  if (!read()) return;
  const token = event.target.closest?.(".fx-t"), map = event.target.closest?.(".fx-map, .fx-head");
  if (token) return show(+token.dataset.i, event.clientX, event.clientY);
  if (!map) return hide();
  const frame = map.getBoundingClientRect(), y = event.clientY - frame.top;
  let under = null;
  if (map.classList.contains("fx-map")) data.layers.forEach(([, top, row, many], l) => {
    const expert = Math.floor((y - top) / row);
    if (expert >= 0 && expert < many) under = [l, expert];
  });
  show(Math.floor((event.clientX - frame.left) / data.column), event.clientX, event.clientY, under);
});
element.addEventListener("pointerleave", hide);
element.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9, Escape: 0 }[event.key];
  if (step === undefined || !event.target.closest?.(".fx-maps") || !read()) return;
  event.preventDefault();
  if (!step) return hide();
  const i = Math.min(data.tokens.length - 1, Math.max(0, at + step)), maps = find(".fx-maps");
  const x = i * data.column, side = find(".fx-corner").offsetWidth;
  if (x < maps.scrollLeft || x > maps.scrollLeft + maps.clientWidth - side - 60)
    maps.scrollLeft = Math.max(0, x - maps.clientWidth / 2 + side);
  const frame = find(".fx-map").getBoundingClientRect();
  show(i, frame.left + x + data.column, Math.max(frame.top, maps.getBoundingClientRect().top + 90));
});
// A drawing that grows stays at its end, unless it was scrolled back.
element.addEventListener("scroll", event => {
  const maps = event.target;
  if (!maps.classList?.contains("fx-maps")) return;
  follow = maps.scrollLeft + maps.clientWidth > maps.scrollWidth - 40;
  left = maps.scrollLeft;
}, true);
watch("value", () => {
  at = -1;
  const maps = find(".fx-maps");
  if (maps) maps.scrollLeft = follow ? maps.scrollWidth : left;
});
"""
