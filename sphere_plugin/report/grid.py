"""Plain tables: one form for the page and for a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sphere_plugin.report.studies import Entry


@dataclass(frozen=True)
class Field:
    """One cell: how it is written, and the unrounded number if it is one."""

    text: str
    value: float | None = None

    @property
    def number(self) -> bool:
        """Whether it is aligned as a number."""
        return self.value is not None

    @property
    def raw(self) -> str:
        """The number with all its digits, or the text."""
        return self.text if self.value is None else repr(self.value)


@dataclass(frozen=True)
class Line:
    """One row; it is shown and hidden with its entry."""

    entry: Entry | None
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        name: of its CSV file.
        title: above it.
        heads: of its columns.
        lines: its rows.
        note: what must be known to read it.
    """

    name: str
    title: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str = ""

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(line.fields[column].number for line in self.lines)

    def csv(self) -> str:
        """Returns it as CSV, numbers unrounded."""
        return csv_text(self.heads, ([field.raw for field in line.fields] for line in self.lines))


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns CSV with a header; None is an empty cell, and no cell can be taken for a formula by a spreadsheet."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_safe(cell) for cell in row] for row in rows)
    return content.getvalue()


def _safe(cell: object) -> object:
    """Text that begins like a formula gets an apostrophe before it; numbers stay."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
