"""The tables of docs/reliability.md are what tests have counted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

CASES = """<testsuites><testsuite>
<testcase classname="a" name="one"><properties>
<property name="fault" value="journal/000001.json: truncated"/><property name="outcome" value="refused"/>
</properties></testcase>
<testcase classname="a" name="two"><properties>
<property name="fault" value="statistics: truncated"/><property name="outcome" value="recomputed"/>
</properties></testcase>
<testcase classname="b" name="three"><properties><property name="inputs" value="{inputs}"/>
<property name="of" value="requests"/><property name="right" value="7"/><property name="refused" value="5"/>
</properties></testcase>
<testcase classname="c" name="four"><properties><property name="kills" value="3"/></properties></testcase>
<testcase classname="c" name="five"><properties><property name="kills" value="99"/></properties><skipped/></testcase>
<testcase classname="d" name="six">{six}</testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    found = importlib.util.spec_from_file_location("reliability", ROOT / "tools" / "reliability.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def counts(tool: ModuleType, folder: Path, inputs: int = 12, six: str = "") -> dict:
    file = folder / "tests.xml"
    file.write_text(CASES.format(inputs=inputs, six=six))
    return tool.counted(tool.properties([file]))


def test_counts_are_added_up(tool: ModuleType, tmp_path: Path) -> None:
    numbers = counts(tool, tmp_path)
    assert numbers["faults"] == {"truncated": {"recomputed": 1, "refused": 1}}
    assert numbers["inputs"] == {"requests": {"refused": 5, "right": 7}}
    assert (numbers["kills"], numbers["edits"], numbers["editors"]) == (3, 0, 0)
    table = tool.tables(numbers)
    assert (
        "| faults injected / survived | 2 / 2 |" in table
        and "| inputs generated / wrongly handled | 12 / 0 |" in table
    )
    assert "| truncated | 1 | 1 | 0 |" in table and "| requests | 7 | 5 |" in table


@pytest.mark.parametrize("wrong", [{"inputs": 13}, {"six": "<failure/>"}, {"six": "<error/>"}])
def test_nothing_is_said_of_tests_that_failed(wrong: dict, tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(tool.Untrustworthy):
        counts(tool, tmp_path, **wrong)


def test_the_page_has_the_numbers_that_are_committed(tool: ModuleType) -> None:
    page, numbers = tool.PAGE.read_text(), json.loads(tool.NUMBERS.read_text())
    assert tool.written(page, numbers) == page
    assert sum(sum(row.values()) for row in numbers["inputs"].values()) >= 10_000
    assert numbers["edits"] >= 10_000 and numbers["editors"] >= 24 and numbers["kills"] >= 10
