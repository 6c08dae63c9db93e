"""The routing view: what is drawn is what was told, and nothing of it is markup."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_api import EXPERTS, LAYERS, MODEL, TEXT, routed
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.client.markup import count, esc, plural, visible
from fathom.client.routing import COLUMN, SHADES, SHOWN, draw, measure, shares
from fathom.client.wire import LayerRouting, Model, RoutedToken

model = Model.model_validate(MODEL)
SQUARE = re.compile(r"M(\d+) (\d+)h")


def tokens(n: int) -> list[RoutedToken]:
    return [RoutedToken.model_validate(routed(i, TEXT[i % len(TEXT)])) for i in range(n)]


def tree(drawn: str) -> ElementTree.Element:
    """The figure as XML: it must be well-formed, quotes and all."""
    text = drawn[drawn.index("<figure") :].replace(" hidden>", ' hidden="">')
    return ElementTree.fromstring(text)


def squares(figure: ElementTree.Element) -> Counter[tuple[int, int, int]]:
    """(token, y, shade) of every square of the map."""
    found: Counter[tuple[int, int, int]] = Counter()
    for path in figure.iterfind(".//svg[@class='fx-map']/path"):
        shade = int(path.attrib["class"].removeprefix("fx-w"))
        for x, y in SQUARE.findall(path.attrib["d"]):
            found[int(x) // COLUMN, int(y), shade] += 1
    return found


def test_every_choice_is_one_square_at_its_place_in_its_shade() -> None:
    answer = tokens(20)
    view = measure(answer, EXPERTS)
    assert view is not None
    expected: Counter[tuple[int, int, int]] = Counter()
    for i, token in enumerate(answer):
        for layer, routing in zip(view.layers, token.layers, strict=True):
            for expert, weight in zip(routing.experts, routing.weights, strict=True):
                shade = min(SHADES - 1, int(SHADES * (weight / 2.5) / 0.6))
                expected[i, layer.top + layer.row * expert, shade] += 1
    assert squares(tree(draw(answer, model))) == expected


def test_loads_are_multiples_of_a_fair_share() -> None:
    view = measure(tokens(50), EXPERTS)
    assert view is not None
    assert [layer.index for layer in view.layers] == list(LAYERS)
    for layer in view.layers:
        assert sum(layer.counts) == layer.chosen == 150
        assert sum(layer.load(e) for e in range(EXPERTS)) == pytest.approx(EXPERTS)


def test_the_pointer_finds_every_number() -> None:
    answer = tokens(7)
    data = json.loads(tree(draw(answer, model)).attrib["data-routing"])
    assert [box[0] for box in data["layers"]] == list(LAYERS)
    assert data["column"] == COLUMN
    for i, (token, told) in enumerate(zip(answer, data["tokens"], strict=True)):
        assert told[:4] == [i + 1, visible(token.token), token.token_id, int(token.draft)]
        assert told[4] == [[list(layer.experts), list(layer.weights)] for layer in token.layers]


def test_accepted_drafts_are_marked_in_the_text_and_over_their_columns() -> None:
    answer = tokens(9)
    figure = tree(draw(answer, model))
    marked = [span.attrib["data-i"] for span in figure.iterfind(".//span[@class='fx-t fx-draft']")]
    assert marked == [str(i) for i, token in enumerate(answer) if token.draft]
    assert len(figure.findall(".//svg[@class='fx-head']/path[@class='fx-mark']")) == len(marked)
    assert "MTP had proposed 3 of the 9 tokens." in "".join(figure.find("figcaption").itertext())  # type: ignore[union-attr]
    assert "fx-draft" not in draw([token.model_copy(update={"draft": False}) for token in answer], model)


def test_a_text_is_never_markup() -> None:
    drawn = draw(tokens(24), model)
    assert "<script" not in drawn
    said = [span.text for span in tree(drawn).iterfind(".//span") if "data-i" in span.attrib]
    assert said[3] == " <script>alert(1)</script>"
    # Gradio's HTML component has templates of its own
    assert "{{" not in drawn
    assert "${" not in drawn


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_any_text_stays_text(text: str) -> None:
    token = RoutedToken.model_validate(routed(0, text))
    figure = tree(draw([token], model))
    data = json.loads(figure.attrib["data-routing"])
    assert data["tokens"][0][1] == visible(text)
    shown = figure.find(".//span[@data-i='0']")
    assert shown is not None
    kept = html.unescape(esc(text.replace("\n", "↵\n") if text else "⟨100⟩"))
    assert shown.text == kept


def test_a_long_answer_is_drawn_to_its_end_and_counted_whole() -> None:
    answer = tokens(SHOWN + 30)
    figure = tree(draw(answer, model))
    assert {square[0] for square in squares(figure)} == set(range(SHOWN))
    first = json.loads(figure.attrib["data-routing"])["tokens"][0]
    assert (first[0], first[2]) == (31, answer[30].token_id)
    assert f"Drawn are the last {SHOWN}" in draw(answer, model)
    view = measure(answer, EXPERTS)
    assert view is not None
    assert view.layers[0].chosen == 3 * (SHOWN + 30)


def test_nothing_to_draw_is_said() -> None:
    dense = Model.model_validate(MODEL | {"fathom": MODEL["fathom"] | {"moe_layers": []}})
    other = Model(id="gpt-2")
    said = {draw((), known) for known in (None, model, dense, other)}
    assert len(said) == 3  # nothing was asked yet; dense; another server
    assert all("<figure" not in each for each in said)
    assert "dense" in draw(tokens(0), dense)
    bare = [RoutedToken(token_id=1, token="x")]
    assert "no experts for this answer" in draw(bare, model)


@pytest.mark.parametrize(
    "layers",
    [
        [{"layer": 3, "experts": [200], "weights": [1.0]}],  # more experts than the card said
        [{"layer": 3, "experts": [0, 1], "weights": [0.0, 0.0]}],
        [{"layer": 3, "experts": [0, 1], "weights": [0.5]}],  # a server that forgot one
        [{"layer": 3, "experts": [], "weights": []}, {"layer": 7, "experts": [2], "weights": [1e-30]}],
    ],
)
def test_odd_routing_is_drawn_too(layers: list[dict[str, Any]]) -> None:
    token = RoutedToken.model_validate({"token_id": 1, "token": "x", "layers": layers})
    assert squares(tree(draw([token, RoutedToken(token_id=2, token="y")], model)))


def test_shares_do_not_depend_on_the_scale_of_weights() -> None:
    one = LayerRouting(layer=0, experts=(4, 2), weights=(0.75, 0.25))
    ten = LayerRouting(layer=0, experts=(4, 2), weights=(7.5, 2.5))
    assert list(shares(one)) == list(shares(ten)) == [(4, 0.75), (2, 0.25)]


def test_markup() -> None:
    assert esc("<a href='x'>&{$`") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&#123;&#36;&#96;"
    assert esc("a\x00b\x1b\x85") == "a␀b␛\ufffd"
    assert esc("\ud800") == "?"
    assert visible(" a\n\t") == "·a↵⇥"
    assert [count(n) for n in (999, 560_112, 1_927_456, 671_000_000_000)] == ["999", "560,112", "1.93M", "671B"]
    assert plural(1, "token") == "1 token"
    assert plural(2000, "token") == "2,000 tokens"
