"""The page: complete, self-contained, safe, the same every time, written whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_run, table

from fathom.cli.main import main
from fathom.errors import ConfigError
from fathom.report.html import page, write
from fathom.report.maps import colors, over_steps
from fathom.report.plots import BINS, binned, learning, short
from fathom.report.read import LayerLoad, read, read_runs
from fathom.report.svg import VARIABLES
from fathom.report.words import esc, flat

VOID = {"meta", "input", "br", "link", "img"}


class Reader(HTMLParser):
    """Tags, ids and links of a page; complains where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.labels: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "xlink:href", "src"):
                self.links.append(str(value))
            if name == "aria-label":
                self.labels.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [
        make_run(base / "a" / "demo"),
        make_run(base / "b" / "demo", seed=2, layers=(), mtp=False, validation=False),
    ]


@pytest.fixture(scope="module")
def single(runs: list[Path]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return page([read(runs[0])])


@pytest.fixture(scope="module")
def several(runs: list[Path]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return page(read_runs(runs))


def test_what_stands_on_it(single: str) -> None:
    seen = Reader(single)
    for word in ("demo", "6.12M", "3.46M active", "MLA attention", "Loss", "Bits per byte", "Learning rate"):
        assert word in seen.text
    for word in ("Gradient norm", "Tokens a second", "MaxVio", "Layer 2", "resumed", "skipped: gradient spike"):
        assert word in seen.text
    assert "packages.torch" in seen.text
    assert "num_attention_heads: 4" in seen.text
    assert "at step 5." in seen.text
    assert seen.tags.count("figure") == seen.tags.count("figcaption") == seen.tags.count("svg")
    assert all(len(label) > 10 for label in seen.labels if label not in ("Sections",))


@pytest.mark.parametrize("which", ["single", "several"])
def test_nothing_comes_from_elsewhere(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    seen = Reader(text)
    assert [link for link in seen.links if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert not re.search(r"@import|url\((?!#)", text)
    ids = set(seen.ids)
    assert len(ids) == len(seen.ids), "an id stands twice"
    assert {link[1:] for link in seen.links if link.startswith("#")} <= ids
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= ids
    assert not [color for color in VARIABLES if color in text], "a stand-in colour was left"
    assert seen.tags.count("script") == 1


def test_a_run_cannot_write_the_page(single: str) -> None:
    assert "<script>alert" not in single
    assert "alert('x')" in Reader(single).text
    assert "\0" not in single
    assert "\x1b" not in single


def test_the_script_is_the_one_that_is_allowed(single: str) -> None:
    import base64
    import hashlib

    script = re.search(r"<script>(.*)</script>", single, re.S)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in single


def test_equal_runs_equal_bytes_whatever_the_matplotlibrc(runs: list[Path], single: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert page([read(runs[0])]) == single


def test_several(several: str) -> None:
    seen = Reader(several)
    assert "2 runs compared" in seen.text
    assert "a/demo" in seen.text
    assert "b/demo" in seen.text
    assert seen.tags.count("table") >= 2
    assert "Layer 3" in seen.text
    assert "MTP loss" in seen.text  # one of them has it


def test_settings_that_differ(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "c", steps=10, layers=())
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("muon", "adamw").replace("lr: 0.02", "lr: 0.001"))
    found = Reader(page(read_runs([runs[1], other])))
    assert {"optimizer.kind", "adamw", "optimizer.lr", "training.max_steps"} <= set(found.texts)
    assert "training.seed" not in found.texts


@pytest.mark.parametrize("columns", [1, 2])
def test_a_run_of_few_rows(tmp_path: Path, columns: int) -> None:
    run = make_run(tmp_path / "a", steps=columns * 5, layers=(1,), experts=3, mtp=False, validation=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page([read(run)])
    assert "Bits per byte" not in text
    assert "Layer 1" in text


def test_a_run_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1}')
    assert "no row of metrics yet" in Reader(page([read(tmp_path)])).text


def test_loads_that_were_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=10, layers=())
    header = "step,layer,expert,load,bias,max_vio,entropy,dead,dropped"
    table(run / "experts.csv", header, [[5, 1, e, None, None, None, None, 3, 0] for e in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = Reader(page([read(run)]))
    assert "No load was measured" in seen.text
    assert "Dead experts" in seen.text


def test_many_layers_are_a_band(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "a", steps=10, layers=tuple(range(7)), experts=2))
    from fathom.report.plots import routing

    plots = routing(run.experts)
    assert "median of 7 layers" in plots[0].caption


# --- drawing ------------------------------------------------------------


def layer(step: list[float], load: list[list[float]]) -> LayerLoad:
    none = np.full(len(step), np.nan)
    loads = np.array(load, dtype=float)
    return LayerLoad(0, np.array(step, dtype=float), loads, np.full(loads.shape, np.nan), none, none, none, none)


def test_a_column_is_the_mean_over_its_steps() -> None:
    uneven = layer([1, 4], [[1, 0], [0.25, 0.75]])  # step 1, then steps 2 to 4
    fine, width = over_steps(uneven, 4)
    assert fine == pytest.approx(np.array([[2, 0.5, 0.5, 0.5], [0, 1.5, 1.5, 1.5]]))
    assert width == 1
    coarse, _ = over_steps(uneven, 1)
    assert coarse == pytest.approx(np.array([[0.875], [1.125]]))
    holes, _ = over_steps(layer([2, 4], [[np.nan, np.nan], [0.5, 0.5]]), 2)
    assert np.isnan(holes[:, 0]).all()
    assert holes[:, 1] == pytest.approx([1, 1])


def test_colours_of_a_map() -> None:
    none, cold, fair, warm, far, unknown = colors(np.array([0, 0.5, 1, 1.5, 9, np.nan]))
    assert (none[3], fair[3], far[3]) == (255, 0, 255)
    assert cold[3] == warm[3]
    assert cold[2] > cold[0]
    assert warm[0] > warm[2]
    assert unknown[0] == unknown[1] == unknown[2]


@given(st.integers(BINS + 1, 5 * BINS))
def test_bins_hide_nothing(rows: int) -> None:
    y = np.sin(np.arange(rows) * 1.7)
    y[rows // 2] = 50.0  # a spike
    x, mean, low, high = binned(np.arange(rows, dtype=float), y)
    assert len(x) == BINS
    assert high.max() == 50
    assert (low <= mean + 1e-12).all()
    assert (mean <= high + 1e-12).all()
    assert (np.diff(x) > 0).all()


def test_a_long_run_is_drawn_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=5000, every=1, layers=())
    assert len(learning(read(run))[0].svg) < 100_000


def test_numbers_on_axes() -> None:
    assert [short(n) for n in (0, 0.02, 999, 1200, 2.5e6, 3e9)] == ["0", "0.02", "999", "1.2k", "2.5M", "3B"]


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_is_text(text: str) -> None:
    escaped = esc(text)
    escaped.encode()
    assert not set(escaped) & set("<>\"'\0\x1b\r")


def test_flat() -> None:
    tree = {"a": {"b": None, "c": [1, 2.5]}, "d": [{"e": True}], "f": {}}
    assert flat(tree) == {"a.b": "null", "a.c": "[1, 2.5]", "d.0.e": "true", "f": "{}"}


# --- writing, and the command ------------------------------------------------------------


def test_the_command(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[1])]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == runs[1] / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(runs[1].glob(".*")) == []


def test_several_go_here(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fathom.report.html.page", lambda tables: "a page")
    assert main(["report", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["report"] == "report.html"
    assert (tmp_path / "report.html").read_text() == "a page"
    assert [run["name"] for run in found["runs"]] == ["a/demo", "b/demo"]
    assert found["runs"][0]["parameters"] == 6_123_457


@pytest.mark.parametrize(
    ("name", "words"),
    [("metrics.csv", "ends in .html"), ("no/such/x.html", "there is no folder"), ("folder.html", "it is a folder")],
)
def test_outputs_that_are_refused(
    runs: list[Path], tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "metrics.csv").write_text("mine")
    assert main(["report", str(runs[0]), "-o", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == "mine"


def test_no_run_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_full_disk_leaves_the_page_that_was(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_ = tmp_path / "x.html"
    page_.write_text("before")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left"):
        write([read(runs[1])], page_)
    assert page_.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, fathom.report.html, fathom.cli.report\n"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
