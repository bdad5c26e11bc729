"""SPHERE's own editor: the closed forms of MEMIT and AlphaEdit in batches, projected inside the layer loop."""

from sphere_plugin.editing.account import EditReport, LayerReport
from sphere_plugin.editing.config import EditingConfig
from sphere_plugin.editing.editor import Editor

__all__ = ["EditReport", "EditingConfig", "Editor", "LayerReport"]
