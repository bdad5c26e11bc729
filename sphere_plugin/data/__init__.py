"""Facts to edit: the project's own, and the files of the CounterFact, ZsRE and KnowEdit benchmarks."""

from sphere_plugin.data.records import Record, own_text, read_records, records_of

__all__ = ["Record", "own_text", "read_records", "records_of"]
