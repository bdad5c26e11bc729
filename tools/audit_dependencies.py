"""Ask pip-audit whether a version in constraints.txt has a known vulnerability.

    python tools/audit_dependencies.py        # `make audit-dependencies` installs pip-audit and calls this

Exit code 0: none has. 1: some have, each is named. 2: nobody could be asked; the versions are listed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
CONSTRAINTS: Final = ROOT / "constraints.txt"
PATIENCE: Final = 600  # seconds


def pinned(path: Path) -> dict[str, str]:
    """Package -> version."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {name: told for name, mark, told in (line.partition("==") for line in lines if line[:1] != "#") if mark}


def asked(path: Path) -> tuple[Sequence[Mapping[str, Any]], str]:
    """What pip-audit says of each package, and why it says nothing."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(path), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return json.loads(done.stdout)["dependencies"], ""
    except subprocess.TimeoutExpired:
        return (), f"pip-audit has not answered for {PATIENCE} seconds"
    except (ValueError, KeyError):  # no JSON: not installed, or it has given up
        return (), (done.stderr.strip().splitlines() or ["pip-audit says nothing"])[-1]


def verdict(said: Sequence[Mapping[str, Any]], why: str, known: Mapping[str, str]) -> tuple[int, list[str]]:
    """The exit code, and what to print. A package that pip-audit passes over has not been audited."""
    audited = [one for one in said if "vulns" in one]
    if not audited:
        reason = why or next((one["skip_reason"] for one in said if "skip_reason" in one), "no package was looked up")
        listed = [f"{name}=={told}{_differs(name, told)}" for name, told in known.items()]
        return 2, [
            *listed,
            "",
            f"Not audited: nobody could be asked ({reason}). Above are the versions.",
        ]
    found = [(one, hole) for one in audited for hole in one["vulns"]]
    lines = [f"{one['name']}=={one['version']}: {hole['id']}{_mended(hole)}" for one, hole in found]
    passed = [one["name"] for one in said if "vulns" not in one]
    lines += [f"Not audited, because the index does not know them: {', '.join(passed)}."] if passed else []
    return int(bool(found)), [*lines, f"{len(audited)} packages audited, {len(found)} known vulnerabilities."]


def _mended(hole: Mapping[str, Any]) -> str:
    return f", mended in {', '.join(hole['fix_versions'])}" if hole.get("fix_versions") else ", not mended yet"


def _differs(name: str, told: str) -> str:
    """What is installed instead."""
    try:
        here = version(name)
    except PackageNotFoundError:
        return "  (not installed here)"
    return "" if here.partition("+")[0] == told else f"  (installed: {here})"


def main() -> int:
    code, lines = verdict(*asked(CONSTRAINTS), pinned(CONSTRAINTS))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
