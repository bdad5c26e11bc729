"""What a run looks like: a table for the terminal, and figures."""

from sphere_plugin.report.demo import draw, table

__all__ = ["draw", "table"]
