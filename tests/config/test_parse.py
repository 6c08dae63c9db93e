# ruff: noqa: E501 (a message stands on one line, as it is printed)
"""Trees into classes; mistakes into words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.config.file import read
from fathom.config.parse import parse
from fathom.config.text import dump
from fathom.errors import ConfigError
from tests.config.toys import SYNONYMS, Data, Gqa, Hub, Mla, Model, Text, Toy, Training

DATA = "data: {datasets: [{kind: hub, path: x}]}\n"  # line 1 of every file below


def load(folder: Path, text: str, *overrides: str) -> Toy:
    (folder / "t.yaml").write_text(text, encoding="utf-8")
    return parse(read(folder / "t.yaml", overrides), Toy, SYNONYMS)


def complaint(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "t.yaml"), "t.yaml")


def test_a_whole_configuration(tmp_path: Path) -> None:
    text = """
model: {hidden_size: 256, attention: {kind: mla, num_attention_heads: 4, kv_lora_rank: 16}, moe: {layers: [1, 3]}}
data: {datasets: [{kind: text, path: a/b.txt}, {kind: hub, path: x, weight: 2}], fraction: 0}
training: {output_dir: runs/x, betas: [0.8, 0.9], prompts: [a, b], threads: 3, lr: 1, named: {a: 1}}
"""
    config = load(tmp_path, text)
    assert config.model.attention == Mla(kind="mla", num_attention_heads=4, kv_lora_rank=16)
    assert config.model.moe is not None
    assert config.model.moe.layers == (1, 3)
    assert config.data.datasets == (Text(kind="text", path=Path("a/b.txt")), Hub(kind="hub", path="x", weight=2.0))
    assert (config.training.betas, config.training.prompts, config.training.threads) == ((0.8, 0.9), ("a", "b"), 3)
    assert (config.training.lr, config.training.named) == (1.0, {"a": 1})


def test_a_section_written_in_part_lies_over_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, DATA, "model.attention.num_attention_heads=12").model.attention == Gqa(
        num_attention_heads=12, num_key_value_heads=4
    )
    text = DATA + "model: {attention: {kind: mla, num_attention_heads: 2, kv_lora_rank: 3}}\n"
    assert load(tmp_path, text).model.attention == Mla(kind="mla", num_attention_heads=2, kv_lora_rank=3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [  # (file after DATA, the message)
        ("model:\n  hiden_size: 3\n", "t.yaml:3: model.hiden_size: unknown key; did you mean hidden_size?"),
        ("model: {Hidden-Size: 3}\n", "t.yaml:2: model.Hidden-Size: unknown key; did you mean hidden_size?"),
        ("modle: {}\n", "t.yaml:2: modle: unknown key; did you mean model?"),
        ("hidden_size: 3\n", "t.yaml:2: hidden_size: unknown key; did you mean model.hidden_size?"),
        ("model: {d_model: 3}\n", "t.yaml:2: model.d_model: unknown key; did you mean model.hidden_size?"),
        ("model: {learning-rate: 3}\n", "t.yaml:2: model.learning-rate: unknown key; did you mean training.lr?"),
        (
            "model: {moe: {qqq: 3}}\n",
            "t.yaml:2: model.moe.qqq: unknown key; possible are layers, n_routed_experts",
        ),
        (
            "model: {attention: {kind: gqa, kv_lora_rank: 3}}\n",
            "t.yaml:2: model.attention.kv_lora_rank: unknown key for kind: gqa; it belongs to kind: mla",
        ),
        (
            "model: {attention: {kind: nla}}\n",
            "t.yaml:2: model.attention: there is no kind: nla; possible are gqa | mla; did you mean mla?",
        ),
        (
            "model: {attention: mla}\n",
            "t.yaml:2: model.attention: given the text 'mla'; must be a section with kind: gqa | mla; "
            "write kind: mla inside the section",
        ),
        (
            "model: {attention: {kind: mla, num_attention_heads: 2}}\n",
            "t.yaml:2: model.attention.kv_lora_rank: is missing; it must be a whole number greater than 0 "
            "(C: width of the latent)",
        ),
        (
            "model: {attention: {kind: mla, num_attention_heads: 2, kv_lora_rnk: 3}}\n",
            "t.yaml:2: model.attention.kv_lora_rnk: unknown key; did you mean kv_lora_rank?",
        ),
        (
            "model:\n  attention:\n    num_key_value_heads: 3\n",
            "t.yaml:4: model.attention.num_key_value_heads: num_key_value_heads is 3, which does not divide the heads",
        ),
        (
            "training:\n  max_steps: 3\n  sequence_length: 513\n",
            "t.yaml:4: training.sequence_length: training.sequence_length is 513, more than model.hidden_size",
        ),
        ("model: {hidden_size: -1}\n", "t.yaml:2: model.hidden_size: given -1; must be a whole number greater than 0"),
        (
            "model: {hidden_act: silo}\n",
            "t.yaml:2: model.hidden_act: given the text 'silo'; must be silu; did you mean silu?",
        ),
        ("model: {moe: none}\n", "t.yaml:2: model.moe: given the text 'none'; must be a section with the keys layers, n_routed_experts, or null; write null"),
        ("training:\n  prompts:\n  - Once: upon\n", "t.yaml:4: training.prompts.0: given a section with the keys Once; must be text; put it in quotes: 'Once: upon'"),
        ("model: {attention: {kv_lora_rank: 3}}\n", "t.yaml:2: model.attention.kv_lora_rank: unknown key for kind: gqa (the default); it belongs to kind: mla"),
        ("model: {eps: .nan}\n", "t.yaml:2: model.eps: given .nan; must be a number greater than 0"),
        ("model: {hidden_size: .inf}\n", "t.yaml:2: model.hidden_size: given .inf; must be a whole number greater than 0"),
        ("training: {max_steps: 1e4}\n", "t.yaml:2: training.max_steps: given 1e4; must be a whole number greater than 0; write 10000"),
        (
            "training: {max_steps: 10,5}\n".replace("10,5", "'10,000'"),
            "t.yaml:2: training.max_steps: given the text '10,000'; must be a whole number greater than 0; write 10000",
        ),
        ("training: {max_steps: 10k}\n", "t.yaml:2: training.max_steps: given the text '10k'; must be a whole number greater than 0; write 10000"),
        ("training: {lr: '1e-3'}\n", "t.yaml:2: training.lr: given the text '1e-3'; must be a number; take the quotes off"),
        ("training: {lr: '0,5'}\n", "t.yaml:2: training.lr: given the text '0,5'; must be a number; write 0.5"),
        ("training: {lr: 5 %}\n", "t.yaml:2: training.lr: given the text '5 %'; must be a number; write 0.05"),
        ("training: {lr: fast}\n", "t.yaml:2: training.lr: given the text 'fast'; must be a number"),
        ("training: {lr: null}\n", "t.yaml:2: training.lr: given null; must be a number"),
        ("training: {compile: 'True'}\n", "t.yaml:2: training.compile: given the text 'True'; must be true or false; write true without quotes"),
        ("training: {compile: 1}\n", "t.yaml:2: training.compile: given 1; must be true or false; write true"),
        ("training: {threads: many}\n", "t.yaml:2: training.threads: given the text 'many'; must be a whole number or auto"),
        ("training: {prompts: hi}\n", "t.yaml:2: training.prompts: given the text 'hi'; must be a list of texts, as [a, b]; write [hi]"),
        ("training: {prompts: [a, no]}\n", "t.yaml:2: training.prompts.1: given no; must be text; put it in quotes: 'no'"),
        ("training: {output_dir: 3}\n", "t.yaml:2: training.output_dir: given 3; must be a path; put it in quotes: '3'"),
        ("training: {betas: [0.9]}\n", "t.yaml:2: training.betas.1: is missing; it must be a number"),
        ("training: {named: {a: b}}\n", "t.yaml:2: training.named.a: given the text 'b'; must be a whole number"),
        ("model: {moe: {layers: 2}}\n", "t.yaml:2: model.moe.layers: given 2; must be a list of whole numbers, as [a, b], or null; write [2]"),
        (
            "training:\n",
            "t.yaml:2: training: given nothing; must be a section with the keys output_dir, max_steps, sequence_length, "
            "prompts, betas, threads, compile, lr, named; leave the key out to have the defaults",
        ),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    assert complaint(tmp_path, DATA + text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model: {}\n", "t.yaml: data: is missing; it must be a section with the keys datasets, fraction"),
        (
            "data: {datasets: []}\n",
            "t.yaml:1: data.datasets: given a list of 0; must be a list of sections, each with a `- ` before its first key "
            "with at least 1 item",
        ),
        (
            "data:\n  datasets:\n    kind: hub\n    path: x\n",
            "t.yaml:2: data.datasets: given a section with the keys kind, path; must be a list of sections, each with a `- ` "
            "before its first key with at least 1 item; write `- ` before its first key",
        ),
        ("data:\n  datasets:\n  - {path: x}\n", "t.yaml:3: data.datasets.0: needs a kind: hub | text"),
        (
            "data:\n  datasets:\n  - {path: x, documents: line}\n",
            "t.yaml:3: data.datasets.0: needs a kind: hub | text; its keys are those of kind: text",
        ),
        (
            "data:\n  datasets:\n  - kind: text\n    path: x\n    document: line\n",
            "t.yaml:5: data.datasets.0.document: unknown key; did you mean documents?",
        ),
    ],
)
def test_mistakes_in_lists_of_sections(tmp_path: Path, text: str, wanted: str) -> None:
    assert complaint(tmp_path, text) == wanted


def test_all_mistakes_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = DATA + "training:\n  max_step: 1\n  lr: x\nmodel:\n  hidden_size: y\n"
    assert complaint(tmp_path, text, "model.eps=z").splitlines() == [
        "4 mistakes in the configuration:",
        "  t.yaml:3: training.max_step: unknown key; did you mean max_steps?",
        "  t.yaml:4: training.lr: given the text 'x'; must be a number",
        "  t.yaml:6: model.hidden_size: given the text 'y'; must be a whole number greater than 0",
        "  command line: model.eps: given the text 'z'; must be a number greater than 0",
    ]


def test_a_mistake_of_an_override_is_told_as_such(tmp_path: Path) -> None:
    assert complaint(tmp_path, DATA, "training.max_stesp=3") == (
        "command line: training.max_stesp: unknown key; did you mean max_steps?"
    )
    assert complaint(tmp_path, DATA, "datasets.0.path=3").startswith(
        "command line: datasets: unknown key; did you mean data.datasets?"
    )


def test_a_mistake_of_a_base_names_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model:\n  hiden_size: 3\n")
    assert f"{tmp_path / 'base.yaml'}:2: model.hiden_size" in complaint(tmp_path, "base: base.yaml\n" + DATA)


HEADS = st.integers(1, 64)
ATTENTION = st.one_of(
    st.builds(lambda n, times: Gqa(num_attention_heads=n * times, num_key_value_heads=n), HEADS, HEADS),
    st.builds(Mla, kind=st.just("mla"), num_attention_heads=HEADS, kv_lora_rank=HEADS, q_lora_rank=st.none() | HEADS),
)
SOURCES = st.one_of(
    st.builds(Hub, kind=st.just("hub"), path=st.text()),
    st.builds(Text, kind=st.just("text"), path=st.from_regex(r"[a-z0-9.]{1,9}", fullmatch=True).map(Path)),
)
TOYS = st.builds(
    Toy,
    model=st.builds(Model, hidden_size=st.integers(1000, 2000), eps=st.floats(1e-300, 1e300), attention=ATTENTION),
    data=st.builds(Data, datasets=st.lists(SOURCES, min_size=1, max_size=3).map(tuple)),
    training=st.builds(
        Training,
        prompts=st.lists(st.text(), max_size=3).map(tuple),
        threads=st.integers() | st.just("auto"),
        named=st.dictionaries(st.text(), st.integers(), max_size=2),
    ),
)


@settings(max_examples=100, deadline=None)
@given(TOYS)
def test_what_is_dumped_parses_to_an_equal_configuration(tmp_path_factory: pytest.TempPathFactory, config: Toy) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert parse(read(path), Toy) == config
