"""Language models to edit: the one that comes with the package, and any Hugging Face name or folder."""

from sphere_plugin.models.embedded import EMBEDDED_NAME, embedded_model
from sphere_plugin.models.loading import load_model, resolve_model

__all__ = ["EMBEDDED_NAME", "embedded_model", "load_model", "resolve_model"]
