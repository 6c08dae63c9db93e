"""Chat: one prompt, and the same from the Jinja that goes into a tokenizer's folder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import RequestError
from fathom.tokenizer.chat import JINJA, ROLES, STOPS, render

messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(list(ROLES)), "content": st.text()}), max_size=5)


def test_a_dialogue() -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert render(said) == "System: Be brief.\nUser: Why?\nAssistant:"  # type: ignore[arg-type]
    assert render(said, add_generation_prompt=False) == "System: Be brief.\nUser: Why?\n"  # type: ignore[arg-type]


@settings(deadline=None)
@given(messages, st.booleans())
def test_jinja_renders_the_same(said: list, generate: bool) -> None:
    jinja = pytest.importorskip("jinja2.sandbox")
    template = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(JINJA)
    assert template.render(messages=said, add_generation_prompt=generate) == render(said, generate)


def test_unknown_roles_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(RequestError, match="role 'robot'; possible are system, user, assistant"):
        render([{"role": "robot", "content": ""}])


def test_an_answer_stops_where_somebody_else_begins() -> None:
    for stop in STOPS:
        assert stop.strip().rstrip(":") in ROLES.values()
