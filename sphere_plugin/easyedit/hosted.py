"""A method of EasyEdit in a run: batches of requests in, weights changed, nothing scored."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphere_plugin.easyedit.hook import WeightSession
from sphere_plugin.easyedit.methods import METHODS
from sphere_plugin.easyedit.patches import Patches
from sphere_plugin.easyedit.registration import register
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.easyedit.targets import weights_of
from sphere_plugin.easyedit.turns import Turns
from sphere_plugin.editing.account import Touched
from sphere_plugin.process import muted

CACHE = "CONTEXT_TEMPLATES_CACHE"

# r, the mean share of its updates that restraints took away, and that rounding took of what they let through.
Share = tuple[int, float, float]


def open_editor(hparams: Any, folder: Path) -> Any:
    """A BaseEditor for a run.

    EasyEdit adds handlers for each editor to the one logger of all, and writes its log below the working directory.
    Here it goes to ``folder``, and ends when the editor is made: none of it is about an edit, or about another run.
    """
    with muted():  # it says that it writes a log
        host = register()
        module = sys.modules[f"{PACKAGE}.editors.editor"]
        patches, handler_of, before = Patches(), module.get_handler, list(module.LOG.handlers)
        patches.attribute(module, "get_handler", lambda path, log_name: handler_of(str(folder / path), log_name))
        try:
            return host.base_editor(hparams)
        finally:
            patches.undo()
            for handler in [one for one in module.LOG.handlers if one not in before]:
                module.LOG.removeHandler(handler)
                handler.close()


class Hosted:
    """Calls the method of a BaseEditor as its sequential edits do: FT or ROME, whose own state is all in the weights.

    Args:
        editor: a BaseEditor.
        seed: random numbers of batch n come from (seed, n).
    """

    def __init__(self, editor: Any, seed: int) -> None:
        self.editor, self.seed, self.name = editor, seed, editor.alg_name
        self.weights: Mapping[str, nn.Parameter] = weights_of(editor.model, editor.hparams, METHODS[self.name])
        # Of a method without restraints nobody else keeps apart what it remembers.
        self._turns: Turns = getattr(editor.apply_algo, "turns", None) or Turns()
        if self.name == "FT" and getattr(editor.hparams, "objective_optimization", "prompt_last") == "prompt_last":
            editor.tok.padding_side = "right"  # it counts tokens of a prompt from the left

    def prepare(self) -> Sequence[str]:
        """Do on the unedited model what the first edit would do: write context templates, bind restraints."""
        if isinstance(self.editor.apply_algo, WeightSession):
            self.editor.apply_algo.bind(self.editor.model, self.weights)
        found: list[str] = []
        with self._turns.take(), muted():
            self._seed(0)
            for module in self._modules():
                setattr(module, CACHE, None)
                params = self.editor.hparams.context_template_length_params
                for one in module.get_context_templates(self.editor.model, self.editor.tok, params):
                    found += [one] if isinstance(one, str) else one
        return found

    def apply(self, requests: Sequence[Mapping[str, Any]], number: int) -> dict[str, Share]:
        """Write a batch: in one call where the method takes batches, one request after the other where not.

        Returns:
            Weight -> what restraints did; empty without them.
        """
        editor, session = self.editor, self.editor.apply_algo
        batcher = sys.modules[f"{PACKAGE}.editors.batch_editor"].BatchEditor
        whole = [{"ground_truth": "<|endoftext|>", "portability": {}, "locality": {}, **one} for one in requests]
        pieces = [whole] if batcher.is_batchable_method(self.name) else [[one] for one in whole]
        editor.hparams.batch_size = len(pieces[0])
        told: dict[str, list[Touched]] = {}
        with self._turns.take(), muted():  # EasyEdit's methods print a page per fact
            self._seed(number)
            for piece in pieces:
                session(editor.model, editor.tok, piece, editor.hparams, copy=False, return_orig_weights=False)
                for one in session.touched if isinstance(session, WeightSession) else ():
                    told.setdefault(one.name, []).append(one)
        return {
            name: (
                parts[-1].rank,
                fmean(one.removed_share for one in parts),
                fmean(one.rounding_loss or 0.0 for one in parts),
            )
            for name, parts in told.items()
        }

    def memory(self) -> dict[str, Tensor]:
        """What restraints remember of earlier batches beside the weights."""
        session = self.editor.apply_algo
        return session.memory() if isinstance(session, WeightSession) else {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Give restraints what `memory` returned where the same batches had been written; after `prepare`."""
        session = self.editor.apply_algo
        if isinstance(session, WeightSession):
            session.recall(memory)

    def _modules(self) -> list[Any]:
        """The module of this method, if it has context templates; it is where the method's function is defined."""
        session = self.editor.apply_algo
        method = getattr(session, "method", session)
        module = sys.modules.get(getattr(method, "__module__", ""))
        return [module] if module is not None and hasattr(module, CACHE) else []

    def _seed(self, number: int) -> None:
        seed = (self.seed * 1_000_003 + number) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
