"""The examples run, and the README shows what they print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.keeps_cache
def test_the_first_edit_prints_what_the_readme_says() -> None:
    done = subprocess.run(
        [sys.executable, "examples/first_edit.py"], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("The capital of")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(said) == 3
    for line in said:
        assert f"# {line}" in readme
    assert "Vienna" not in said[0]
    assert "Vienna" in said[1]


def test_the_readme_shows_the_example() -> None:
    """Every line of the README's first code block stands in the example, comments aside."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "first_edit.py").read_text(encoding="utf-8")
    block = readme.split("```python\n", 1)[1].split("```", 1)[0]
    plain = [line.split("  #")[0].rstrip() for line in block.splitlines() if line.strip()]
    assert len(plain) >= 10
    for line in plain:
        assert line in example, line
