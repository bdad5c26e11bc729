"""How well a model says what it was taught, and how little else has changed."""

from sphere_plugin.evaluation.quality import Quality, Scores

__all__ = ["Quality", "Scores"]
