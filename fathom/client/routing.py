"""The routing view: which experts each token used, layer by layer.

Tokens run along x, the experts of every MoE layer along y; the shade of a square is the expert's share of what the
chosen experts wrote, w / sum(w). Beside each layer stand the experts' loads over the answer, E n_e / (K n): how many
tokens chose the expert, as a multiple of a fair share. One colour in steps of strength, so that it reads the same to
every eye, and in print; what MTP had proposed is marked by a line as well as by a colour. One piece of HTML, nothing
from elsewhere; the page's script (style.py) shows a token's numbers where the pointer or the arrow keys are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fathom.client.markup import esc, plural, visible
from fathom.client.wire import LayerRouting, Model, RoutedToken

SHADES = 8
SHOWN = 512  # tokens that are drawn, the last ones; loads count all
COLUMN = 15  # px of a token
LABEL = 11  # characters of a token over its column
HEAD, SIDE, GAP = 84, 168, 26  # px: the tokens' names, the layers' names and loads, the space over a layer
TITLE = "<h2>Experts, token by token</h2>"
BEFORE = "Here will stand which experts each token used, layer by layer."
BAR = 78  # px of the longest load


@dataclass(frozen=True)
class Layer:
    """One MoE layer over an answer. counts (E): tokens that chose each expert; chosen: all choices, K times tokens;
    top: px from above; row: px of an expert."""

    index: int
    counts: tuple[int, ...]
    chosen: int
    top: int
    row: int

    @property
    def height(self) -> int:
        """In px."""
        return self.row * len(self.counts)

    def load(self, expert: int) -> float:
        """E n_e / (K n): 1 is a fair share."""
        return len(self.counts) * self.counts[expert] / max(self.chosen, 1)


@dataclass(frozen=True)
class View:
    """An answer's routing, measured: what is drawn, and the words that go with it."""

    tokens: tuple[RoutedToken, ...]
    layers: tuple[Layer, ...]
    strongest: float
    first: int

    @property
    def shown(self) -> tuple[RoutedToken, ...]:
        """The tokens that are drawn."""
        return self.tokens[self.first :]

    @property
    def width(self) -> int:
        """Of the map, px."""
        return COLUMN * len(self.shown) + 2

    @property
    def height(self) -> int:
        """Of the map, px."""
        return self.layers[-1].top + self.layers[-1].height + 4


def shares(routing: LayerRouting) -> Iterator[tuple[int, float]]:
    """(expert, w / sum(w)) of a token in a layer. Weights may sum to anything: `routed_scaling_factor` is in them."""
    whole = sum(routing.weights)
    for expert, weight in zip(routing.experts, routing.weights, strict=False):
        yield expert, weight / whole if whole > 0 else 0.0


def measure(tokens: Sequence[RoutedToken], experts: int) -> View | None:
    """Count an answer. experts: E, as the model card has it. None: no token went through an expert."""
    counts: dict[int, dict[int, int]] = {}
    strongest = 0.0
    for token in tokens:
        for layer in token.layers:
            found = counts.setdefault(layer.layer, {})
            for expert, share in shares(layer):
                found[expert] = found.get(expert, 0) + 1
                strongest = max(strongest, share)
    counts = {layer: found for layer, found in counts.items() if found}
    if not counts:
        return None
    many = max(experts, *(max(found) + 1 for found in counts.values()))
    row = 10 if many <= 16 else 6 if many <= 64 else 3
    layers, top = [], 0
    for index, found in sorted(counts.items()):
        top += GAP
        each = tuple(found.get(expert, 0) for expert in range(many))
        layers.append(Layer(index, each, sum(each), top, row))
        top += row * many
    return View(tuple(tokens), tuple(layers), strongest or 1.0, max(0, len(tokens) - SHOWN))


def draw(tokens: Sequence[RoutedToken], model: Model | None) -> str:
    """The view as HTML; a sentence where there is nothing to draw."""
    details = model.fathom if model else None
    view = measure(tokens, details.n_routed_experts if details else 0)
    if view is None:
        return f'{TITLE}<p class="fx-note">{esc(_nothing(tokens, model))}</p>'
    return (
        f'{TITLE}<figure class="fx-routing" data-routing="{esc(_data(view))}">'
        f"<figcaption>{esc(' '.join(_words(view)))}</figcaption>"
        f"{_legend(view)}{_line(view)}"
        '<div class="fx-maps" tabindex="0" role="group" '
        'aria-label="Experts of each token. Left and right arrow keys go from token to token.">'
        f'<div class="fx-corner" style="width:{SIDE}px;height:{HEAD}px"><span>load</span></div>'
        f"{_head(view)}{_side(view)}{_map(view)}</div>"
        '<div class="fx-tip" role="status" hidden></div></figure>'
    )


def _nothing(tokens: Sequence[RoutedToken], model: Model | None) -> str:
    if model is None:
        return BEFORE
    if model.fathom is None:
        return "This server does not tell which experts a token used; Fathom's own does."
    if not model.routes:
        return "This model is dense: it has no experts to choose from."
    if tokens:
        return "The server told of no experts for this answer."
    return BEFORE


# --- words


def _words(view: View) -> Iterator[str]:
    layers, many = view.layers, len(view.layers[0].counts)
    tokens = [token for token in view.tokens if token.layers]
    each = round(layers[0].chosen / max(len(tokens), 1))
    yield f"{plural(len(tokens), 'token')} through {plural(len(layers), 'MoE layer')}, {each} of {many} experts each."
    layer, expert = max(((la, e) for la in layers for e in range(many)), key=lambda pair: pair[0].load(pair[1]))
    yield f"Busiest: expert {expert} of layer {layer.index}, with {layer.load(expert):.1f} times a fair share."
    drafts = sum(token.draft for token in view.tokens)
    if drafts:
        yield f"MTP had proposed {drafts:,} of the {plural(len(view.tokens), 'token')}."
    if view.first:
        yield f"Drawn are the last {len(view.shown):,}; loads count all."


def _legend(view: View) -> str:
    steps = "".join(f'<i class="fx-w{shade}"></i>' for shade in range(SHADES))
    marks = (
        '<span><i class="fx-mark"></i>proposed by MTP, accepted</span>'
        '<span><i class="fx-fair-mark"></i>load of a fair share</span>'
    )
    return (
        '<div class="fx-legend"><span class="fx-scale">share of the token: 0 '
        f"<b>{steps}</b> {view.strongest:.2f}</span>{marks}</div>"
    )


def _line(view: View) -> str:
    """The answer as a line of tokens."""
    spans = []
    for i, token in enumerate(view.shown):
        kind = "fx-t fx-draft" if token.draft else "fx-t"
        text = token.token.replace("\n", "↵\n") if token.token else f"⟨{token.token_id}⟩"
        spans.append(f'<span class="{kind}" data-i="{i}">{esc(text)}</span>')
    return f'<p class="fx-tokens" aria-label="The answer, token by token">{"".join(spans)}</p>'


def _data(view: View) -> str:
    """What the script needs: geometry, and every number of every token."""
    order = [layer.index for layer in view.layers]
    tokens = []
    for i, token in enumerate(view.shown, start=view.first + 1):
        by_layer = {layer.layer: layer for layer in token.layers}
        told = [
            [list(found.experts), [round(w, 4) for w in found.weights]] if (found := by_layer.get(index)) else None
            for index in order
        ]
        tokens.append([i, visible(token.token), token.token_id, int(token.draft), told])
    boxes = [[layer.index, layer.top, layer.row, len(layer.counts)] for layer in view.layers]
    return json.dumps({"column": COLUMN, "layers": boxes, "tokens": tokens}, separators=(",", ":"))


# --- drawings


def _svg(kind: str, width: int, height: int, body: str, label: str = "") -> str:
    said = f'role="img" aria-label="{esc(label)}"' if label else 'aria-hidden="true"'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg class="{kind}" {size} {said}>{body}</svg>'


def _head(view: View) -> str:
    """The tokens' names, turned, over their columns."""
    names = []
    for i, token in enumerate(view.shown):
        text = visible(token.token) or f"⟨{token.token_id}⟩"
        text = text if len(text) <= LABEL else text[: LABEL - 1] + "…"
        x = COLUMN * i + COLUMN / 2
        kind = ' class="fx-draft"' if token.draft else ""
        names.append(f'<text{kind} transform="translate({x + 4:g} {HEAD - 8}) rotate(-90)">{esc(text)}</text>')
        if token.draft:
            names.append(f'<path class="fx-mark" d="M{COLUMN * i + 3} {HEAD - 3.5}h{COLUMN - 5}v3h-{COLUMN - 5}z"/>')
    return _svg("fx-head", view.width, HEAD, "".join(names))


def _side(view: View) -> str:
    """The layers' names, experts' numbers, and loads as bars; a line stands at a fair share."""
    most = max(layer.load(expert) for layer in view.layers for expert in range(len(layer.counts)))
    start = SIDE - BAR - 12
    parts = []
    for layer in view.layers:
        many, row = len(layer.counts), layer.row
        parts.append(f'<text class="fx-name" x="0" y="{layer.top - 8}">layer {layer.index}</text>')
        every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if step * row >= 20 or step >= many)
        for expert in range(0, many, every):
            parts.append(f'<text x="{start - 6}" y="{layer.top + row * expert + row / 2 + 4:g}">{expert}</text>')
        bars = "".join(
            f"M{start} {layer.top + row * expert + (row > 3) * 1}h{BAR * layer.load(expert) / most:.1f}"
            f"v{row - (row > 3) * 2}H{start}z"
            for expert in range(many)
            if layer.counts[expert]
        )
        fair = start + BAR / most
        parts.append(f'<path class="fx-bars" d="{bars}"/>')
        parts.append(f'<path class="fx-fair" d="M{fair:.1f} {layer.top - 3}V{layer.top + layer.height + 3}"/>')
    label = "Load of each expert; the line is a fair share."
    return _svg("fx-side", SIDE, view.height, "".join(parts), label)


def _map(view: View) -> str:
    """One path for each shade of each layer: thousands of squares, a few elements."""
    parts = []
    for layer in view.layers:
        wide = COLUMN * len(view.shown)
        parts.append(f'<rect class="fx-bed" y="{layer.top}" width="{wide}" height="{layer.height}"/>')
        gap = 1 if layer.row > 3 else 0
        side = f"h{COLUMN - 1}v{layer.row - gap}h-{COLUMN - 1}z"
        paths: list[list[str]] = [[] for _ in range(SHADES)]
        for i, token in enumerate(view.shown):
            for found in token.layers:
                if found.layer != layer.index:
                    continue
                for expert, share in shares(found):
                    shade = min(SHADES - 1, int(SHADES * share / view.strongest))
                    paths[shade].append(f"M{COLUMN * i} {layer.top + layer.row * expert}{side}")
        parts += [f'<path class="fx-w{s}" d="{"".join(path)}"/>' for s, path in enumerate(paths) if path]
    parts.append(f'<rect class="fx-cursor" y="0" width="{COLUMN - 1}" height="{view.height}" visibility="hidden"/>')
    label = f"Experts of {plural(len(view.shown), 'token')} in {plural(len(view.layers), 'layer')}."
    return _svg("fx-map", view.width, view.height, "".join(parts), label)
