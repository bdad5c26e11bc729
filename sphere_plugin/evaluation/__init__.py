"""How well a model says what it was taught, and how little else has changed."""

from sphere_plugin.evaluation.interval import Interval, interval
from sphere_plugin.evaluation.quality import Quality
from sphere_plugin.evaluation.scores import METRICS, Scores

__all__ = ["METRICS", "Interval", "Quality", "Scores", "interval"]
