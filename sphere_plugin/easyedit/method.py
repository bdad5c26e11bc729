"""SPHERE as EasyEdit calls a method: ``apply_algo(model, tok, requests, hparams, ...) -> (model, weights_copy)``."""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sphere_plugin.easyedit.hparams import SphereHyperParams
from sphere_plugin.editing import Editor
from sphere_plugin.editing.account import EditReport
from sphere_plugin.journaling import Snapshot
from sphere_plugin.progress import Bars

_LOG = logging.getLogger("sphere_plugin")

# Who decides whether an edit stays. Main's editor restores whatever weights_copy holds unless the edit is sequential;
# the PyPI editor restores it always, and a method keeps its edit by returning none.
Restoring = Literal["by editor", "by method"]


@dataclass
class Session:
    """SPHERE on one model: what the editor of :mod:`sphere_plugin.editing` remembers, remembered here.

    Each BaseEditor gets a session of its own, so nothing passes from one to another.

    Attributes:
        restoring: see :data:`Restoring`.
        editor: made when first needed.
        report: of the last batch.
    """

    restoring: Restoring
    editor: Editor | None = None
    report: EditReport | None = None

    def open(self, model: nn.Module, tok: Any, hparams: object) -> Editor:
        """The editor for ``model`` and these settings; a new one where the model is another, or too much has changed.

        Raises:
            ConfigError, ModelError: the model has not what the settings name.
        """
        config = SphereHyperParams.of(hparams).editing()
        known = self.editor
        if known is not None and known.anatomy.model is model:
            if known.reconfigure(config):
                return known
            _LOG.warning("other layers, statistics or base method: SPHERE starts anew from the weights as they are")
        self.editor = Editor(model, tok, config, Bars(hide=frozenset(("aiming",))))
        return self.editor

    def __call__(
        self,
        model: nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: object,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **_: Any,
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Write one batch.

        Args:
            model: edited in place unless ``copy``.
            tok: its tokenizer.
            requests: the batch, EasyEdit's mappings.
            hparams: SphereHyperParams, or an object of EasyEdit's own SPHERE class.
            copy: leave ``model`` alone and edit a copy.
            return_orig_weights: return what was there before the batch.
            keep_original_weight: the PyPI host's word for: this edit is to be undone after it has been scored.

        Returns:
            The edited model, and the weights as they were before this batch, by parameter name, where the host is to
            restore them.
        """
        if copy:
            model = copying.deepcopy(model)
        editor = self.open(model, tok, hparams)
        wanted = return_orig_weights and (self.restoring == "by editor" or keep_original_weight)
        before = Snapshot.take(editor.anatomy.weights if wanted else {})
        self.report = editor.apply(requests)
        return model, dict(before.tensors)


@dataclass(frozen=True)
class SphereMethod:
    """The entry in EasyEdit's table of methods.

    Attributes:
        restoring: see :data:`Restoring`.
        undo: puts EasyEdit back as it was before registration.
        overrides: what it was registered with.
    """

    restoring: Restoring
    undo: Callable[[], None]
    overrides: Mapping[str, object]

    def session(self) -> Session:
        """A session for one editor."""
        return Session(self.restoring)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        """Called from outside a BaseEditor: one batch on its own, without earlier ones."""
        return self.session()(*args, **kwargs)
