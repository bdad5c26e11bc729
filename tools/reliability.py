"""Write what tests have counted into ``docs/results/reliability.json`` and the tables of ``docs/reliability.md``.

    python tools/reliability.py runs/reliability/*.xml --commit ID [--machine "two x86-64 cores"]

Reads pytest's own JUnit files. Tests say what they did as properties (``record_property``): ``fault`` ("kind of file:
fault") and ``outcome``; ``inputs``, ``of``, ``right`` and ``refused``; ``kills``; ``edits``; ``editors``. If a test
failed, that is told and nothing is written: whatever the tables count ended as it should.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "reliability.md"
NUMBERS: Final = ROOT / "docs" / "results" / "reliability.json"
BEGIN, END = "<!-- written by tools/reliability.py -->", "<!-- until here -->"
OUTCOMES: Final = ("recomputed", "refused", "unharmed")


class Untrustworthy(Exception):
    """A test failed, or has not said what it counted."""


def properties(files: Iterable[Path]) -> list[dict[str, str]]:
    """Those of every test that has some.

    Raises:
        Untrustworthy: a test failed.
    """
    found = []
    for file in files:
        for case in ElementTree.parse(file).getroot().iter("testcase"):  # noqa: S314 (written by our own pytest)
            name = f"{case.get('classname')}::{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                raise Untrustworthy(f"{name} failed")
            told = {str(one.get("name")): str(one.get("value")) for one in case.iter("property")}
            if told and case.find("skipped") is None:
                found.append({**told, "test": name})
    return found


def counted(tests: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """The sums; of edits and editors the most that one test had.

    Raises:
        Untrustworthy: numbers of one test that do not belong together.
    """
    faults: dict[str, Counter[str]] = {}
    inputs: dict[str, Counter[str]] = {}
    kills = edits = editors = 0
    for one in tests:
        if "fault" in one:
            if one.get("outcome") not in OUTCOMES:
                raise Untrustworthy(f"{one['test']}: outcome {one.get('outcome')!r}")
            faults.setdefault(one["fault"].rpartition(": ")[2], Counter())[one["outcome"]] += 1
        if "inputs" in one:
            right, refused = int(one["right"]), int(one["refused"])
            if right + refused != int(one["inputs"]):
                raise Untrustworthy(f"{one['test']}: {one['inputs']} inputs, {right} right, {refused} refused")
            inputs.setdefault(one["of"], Counter()).update(right=right, refused=refused)
        kills += int(one.get("kills", 0))
        edits, editors = max(edits, int(one.get("edits", 0))), max(editors, int(one.get("editors", 0)))
    sums = {"kills": kills, "edits": edits, "editors": editors}
    return {"faults": _plain(faults), "inputs": _plain(inputs), **sums}


def _plain(table: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(row.items())) for name, row in sorted(table.items())}


def tables(numbers: Mapping[str, Any]) -> str:
    """As they stand in the page."""
    faults, inputs = numbers["faults"], numbers["inputs"]
    injected = sum(sum(row.values()) for row in faults.values())
    generated = sum(sum(row.values()) for row in inputs.values())
    survived = sum(row.get(one, 0) for row in faults.values() for one in OUTCOMES)
    wrong = generated - sum(row.get("right", 0) + row.get("refused", 0) for row in inputs.values())
    lines = ["| | |", "|---|---|"]
    lines += [f"| faults injected / survived | {injected:,} / {survived:,} |"]
    lines += [f"| inputs generated / wrongly handled | {generated:,} / {wrong:,} |"]
    lines += [f"| kills survived | {numbers['kills']:,} |"]
    lines += [f"| edits in one run | {numbers['edits']:,} |"]
    lines += [f"| editors at once, in threads | {numbers['editors']:,} |", ""]
    lines += [f"| fault | {' | '.join(OUTCOMES)} |", "|---|" + "---|" * len(OUTCOMES)]
    lines += [f"| {name} | {' | '.join(str(row.get(one, 0)) for one in OUTCOMES)} |" for name, row in faults.items()]
    lines += ["", "| generated | right result | refused with a sentence |", "|---|---|---|"]
    lines += [f"| {name} | {row.get('right', 0):,} | {row.get('refused', 0):,} |" for name, row in inputs.items()]
    return "\n".join(lines)


def written(page: str, numbers: Mapping[str, Any]) -> str:
    """The page with these tables in place of those it has."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    about = f"On {numbers['date']}, {numbers['machine']}, commit {numbers['commit']}:"
    return f"{before}{BEGIN}\n\n{about}\n\n{tables(numbers)}\n\n{END}{after}"


def main() -> int:
    """Write both files; 1 and a sentence if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("xml", nargs="+", type=Path)
    parser.add_argument("--machine", default="two x86-64 cores")
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    try:
        sums = counted(properties(arguments.xml))
    except Untrustworthy as error:
        sys.stderr.write(f"nothing written: {error}\n")
        return 1
    today = datetime.now().date().isoformat()
    numbers = {"date": today, "machine": arguments.machine, "commit": arguments.commit, **sums}
    NUMBERS.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), numbers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
