"""Facts to edit: the project's own, and the files of the CounterFact, ZsRE and KnowEdit benchmarks."""

from sphere_plugin.data.records import Record, held_out, read_records, records_of

__all__ = ["Record", "held_out", "read_records", "records_of"]
