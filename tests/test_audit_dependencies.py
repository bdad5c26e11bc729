"""What `make audit-dependencies` makes of pip-audit's answers: no answer is never a good one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "audit_dependencies.py"
spec = importlib.util.spec_from_file_location("audit_dependencies", TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

KNOWN = {"torch": "2.13.0", "nobody-has-it": "1.0"}
FINE = {"name": "torch", "version": "2.13.0", "vulns": []}
HOLE = {"id": "PYSEC-1", "fix_versions": ["2.14.0"], "aliases": [], "description": "…"}
SKIPPED = {"name": "nobody-has-it", "skip_reason": "Dependency not found on PyPI"}


def test_every_pinned_version_is_known() -> None:
    known = tool.pinned(tool.CONSTRAINTS)
    lines = [line for line in tool.CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    assert [f"{name}=={version}" for name, version in known.items()] == lines
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())


def test_nothing_found() -> None:
    assert tool.verdict([FINE], "", KNOWN) == (0, ["1 packages audited, 0 known vulnerabilities."])


def test_a_vulnerability_is_named_with_the_version_that_has_none() -> None:
    code, lines = tool.verdict([{**FINE, "vulns": [HOLE, {"id": "PYSEC-2"}]}, SKIPPED], "", KNOWN)
    assert code == 1
    assert lines[:2] == ["torch==2.13.0: PYSEC-1, mended in 2.14.0", "torch==2.13.0: PYSEC-2, not mended yet"]
    assert "nobody-has-it" in lines[2] and lines[3] == "1 packages audited, 2 known vulnerabilities."


@pytest.mark.parametrize(("said", "why"), [([], "No module named pip_audit"), ([SKIPPED], "")])
def test_where_nobody_could_be_asked_versions_are_listed_and_it_says_so(said: list[object], why: str) -> None:
    """pip-audit itself says "No known vulnerabilities found" of packages that its index does not know."""
    code, lines = tool.verdict(said, why, KNOWN)
    assert code == 2
    assert lines[0].startswith("torch==2.13.0") and lines[1] == "nobody-has-it==1.0  (not installed here)"
    assert lines[-1].startswith("Not audited: ") and (why or "not found on PyPI") in lines[-1]
