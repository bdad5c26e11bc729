"""Facts to edit: the project's own, and the files of the CounterFact and ZsRE benchmarks."""

from sphere_plugin.data.records import Record, own_text, read_records

__all__ = ["Record", "own_text", "read_records"]
