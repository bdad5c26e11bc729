"""Nothing that data, models or files say becomes an element, an attribute or a script of the page.

The same folders are made twice, with harmless and with hostile texts wherever a file holds text, and the two pages are
compared: hostile texts may add neither a tag nor an attribute.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_study
from sweep_runs import write_sweep
from test_report_abilities import kept, put
from test_report_audit import write as write_audit
from test_report_interference import diagnose

from sphere_plugin.errors import CacheError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.report.page import write_report

# Names of entries that are longer than a figure is wide.
pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

HARMLESS = "x1"
HOSTILE = (
    "x1<script>alert(1)</script><img src=x onerror=alert(2)>\"><b onclick='alert(3)'>' onmouseover='alert(4)"
    '</title></style></pre></td></svg></details><a href="javascript:alert(5)">{{ 7 * 7 }}{% raw %}'
    "<iframe srcdoc=x><!--]]><![CDATA[ &lt;u&gt; <u title=`x`></script\n><svg/onload=alert(6)>\\u003cs>"
)
# What files say of each other, and words of which there are a few, any other of which is refused.
KEPT = frozenset(("entry", "after", "weights", "runs", "efficacy", "generalization", "specificity", "action"))
# Objects whose keys are names of somebody's choice.
NAMED = frozenset(("energy", "tasks", "versions", "hparams"))


def spoiled(value: Any, mark: str, key: str = "") -> Any:
    """JSON with ``mark`` behind every text in it."""
    if isinstance(value, str):
        return value if key in KEPT else value + mark
    if isinstance(value, list):
        return [spoiled(one, mark, key) for one in value]
    if isinstance(value, dict):
        return {k + mark if key in NAMED else k: spoiled(one, mark, k) for k, one in value.items()}
    return value


def page(folder: Path, mark: str, name: str) -> str:
    """The page of a study with every section, of one without weights, and of a sweep."""
    whole, bare, sweep = (folder / f"{kind}{name}" for kind in ("whole", "bare", "sweep"))
    for study in (whole, bare):
        write_study(study, edits=40, file=f"{study.name}.json")
    for entry, factor in (("memit", 1.5), ("memit+sphere", 1.2)):
        diagnose(whole / entry, format=1)
        for edits in (0, 40):
            put(whole / entry, edits, rte=kept(1, 0, 1, 0))
            write_audit(whole, entry, edits, factor if edits else 1.0)
        stopped = [{"edits": 20, "reason": "energy", "action": "stop", "left": 20}]
        write_json(bare / entry / "guard.json", stopped)
        for path in (bare / entry / "journal").glob("*.safetensors"):
            path.unlink()
    write_sweep(sweep, {"eta": [0.3, 0.5], "alpha": [0.5, 0.8]}, bases=("memit",))
    for path in folder.rglob("*.json"):
        if path.parent != whole / path.parts[-3] / "journal":  # tied to the weights beside it
            write_json(path, spoiled(read_json(path), mark))
    return write_report([whole, bare, sweep], folder / "report").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """What a browser would make of a page: its tags, with their attributes; in figures apart, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside, self.figures = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.comments = 0
        self._inside, self._script = 0, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = (tag, *sorted(key for key, _ in attrs))
        (self.figures if self._inside or tag == "svg" else self.outside)[told] += 1
        self.attributes += [(key, value or "") for key, value in attrs]
        self._inside += tag == "svg"
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag == "svg"
        self._script = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._script:
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Outline, Outline, Path]]:
    harmless, hostile = tmp_path_factory.mktemp("harmless"), tmp_path_factory.mktemp("hostile")
    plain = page(harmless, HARMLESS, "x1")
    spoilt = page(hostile, HOSTILE, "x1<b onclick=alert(7)>\"'&lt;")
    yield Outline(plain), Outline(spoilt), hostile / "report"


def test_hostile_texts_add_no_element_and_no_attribute(pages: tuple[Outline, Outline, Path]) -> None:
    plain, spoilt, _ = pages
    assert spoilt.outside == plain.outside
    # How many ticks and lines of text a figure has depends on the room for them.
    assert {told[0] for told in spoilt.figures} == {told[0] for told in plain.figures}
    attributes = {key for told in spoilt.figures for key in told[1:]}
    assert attributes <= {key for told in plain.figures for key in told[1:]} | {"transform"}
    assert len(plain.scripts) == len(spoilt.scripts) == 2
    assert plain.scripts[1] == spoilt.scripts[1]  # the one that runs
    assert plain.comments == spoilt.comments
    sections = {value for key, value in plain.attributes if key == "id"}
    assert {f"study1-{name}" for name in ("cases", "audit", "abilities", "theorem", "manifest")} <= sections
    assert {"study2-table", "sweep1-cells"} <= sections


def test_no_attribute_runs_or_loads_anything(pages: tuple[Outline, Outline, Path]) -> None:
    for key, value in pages[1].attributes:
        assert not key.startswith("on")
        if key in ("href", "src", "data", "action", "srcdoc", "xlink:href"):
            assert value.startswith(("#", "data:,", "data:image/png;base64,"))
        assert "://" not in value or key in ("xmlns", "data-tip", "aria-label", "title")


def test_hostile_texts_are_shown_as_they_are(pages: tuple[Outline, Outline, Path]) -> None:
    """Escaped once: neither gone nor escaped twice."""
    shown = "".join(pages[1].text)
    assert shown.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in shown and "x149" not in shown
    assert "whole" in "".join(pages[0].text)


def test_the_json_in_the_page_is_json(pages: tuple[Outline, Outline, Path]) -> None:
    assert json.loads(pages[1].scripts[0]) == read_json(pages[2] / "report.json")
    assert "</" not in pages[1].scripts[0]


def test_no_line_of_a_table_for_latex_comes_from_data(pages: tuple[Outline, Outline, Path]) -> None:
    harmless = (pages[2].parents[1] / pages[2].parent.name.replace("hostile", "harmless")) / "report"
    for table in ("study1-table.tex", "study2-table.tex"):
        spoilt, plain = ((folder / table).read_text().splitlines() for folder in (pages[2], harmless))
        assert [line[:2] for line in spoilt] == [line[:2] for line in plain]


@pytest.mark.parametrize("entry", ["../../out", "/tmp/out", "memit/../../out", "memit\x00", "", "Memit", "memit+"])
def test_a_sweep_names_no_file_outside_its_report(tmp_path: Path, entry: str) -> None:
    """An entry is part of the names of figures."""
    folder = write_sweep(tmp_path / "deep" / "sweep", {"eta": [0.3, 0.5]}, bases=("memit",))
    told = read_json(folder / "sweep.json")
    for cell in told["cells"]:
        cell["entry"] = cell["entry"].replace("memit", entry)
    write_json(folder / "sweep.json", told)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match="sweep.json"):
        write_report([folder], tmp_path / "deep" / "report")
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()] == []


@pytest.mark.parametrize("run", ["../../secret", "/tmp/secret", "memit/../../secret", ".."])
def test_a_sweep_has_no_run_outside_itself(tmp_path: Path, run: str) -> None:
    folder = write_sweep(tmp_path / "deep" / "sweep", {"eta": [0.3, 0.5]}, bases=("memit",))
    write_sweep(tmp_path / "secret", {"eta": [0.3]}, bases=("memit",))
    told = read_json(folder / "sweep.json")
    told["cells"][0]["runs"] = [run]
    write_json(folder / "sweep.json", told)
    with pytest.raises(CacheError, match="sweep.json"):
        write_report([folder], tmp_path / "report")
