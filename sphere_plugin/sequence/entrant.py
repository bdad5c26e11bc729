"""What edits in a run: this package's own editor, or a method of EasyEdit. Both through a BaseEditor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from sphere_plugin.data import Record
from sphere_plugin.easyedit.hosted import Hosted, Share
from sphere_plugin.easyedit.method import Session
from sphere_plugin.editing.aim import Aimed
from sphere_plugin.files import fingerprint
from sphere_plugin.geometry import Factors
from sphere_plugin.geometry.neurons import neurons
from sphere_plugin.journaling import Snapshot
from sphere_plugin.journaling.batch import orientations
from sphere_plugin.parallel.ranks import ALONE, Ranks

# Settings that targets depend on.
AIMING: Final = ("layers", "layer_module_tmp", "v_loss_layer", "fact_token", "v_num_grad_steps", "v_lr") + (
    ("v_weight_decay", "clamp_norm_factor", "kl_factor", "aiming_dtype")
)
# Those, and settings that the model and its prefixes depend on, which targets are searched for behind.
SHARING: Final = (*AIMING, "rewrite_module_tmp", "context_template_length_params", "seed", "fp16", "bf16")


@dataclass(frozen=True)
class Done:
    """What a batch did.

    Attributes:
        layers: per weight what docs/run-folder.md has under `layers`, without energy and sigma_max.
        updates: name -> what was added, where the method tells it; see `Journal.append`.
        keys: name -> keys [d_in, u] that the method remembers.
        losses: per fact, of the search for its target.
        steps: per fact, of that search.
    """

    layers: list[dict[str, Any]]
    updates: Mapping[str, Tensor | Factors] = field(default_factory=dict)
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Sequence[float] = ()
    steps: Sequence[int] = ()


class Entrant(Protocol):
    """One entry of a comparison, with its model."""

    model: nn.Module
    tokenizer: Any

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """Name -> live weight, of all that it may write."""
        ...

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Name -> float32 master copy of the weight as it is now, of those that have one."""
        ...

    def prepare(self) -> Sequence[str]:
        """Do what has to be done on the unedited model; returns the prefixes facts are edited behind."""
        ...

    def apply(self, records: Sequence[Record], number: int, aimed: Aimed | None = None) -> Done:
        """Write batch ``number``, from 1; ``aimed`` are its targets where they are known."""
        ...

    def resume(
        self, batches: Iterator[Mapping[str, Tensor]], memory: Mapping[str, Tensor], masters: Mapping[str, Tensor]
    ) -> None:
        """Go on after these batches, given by their keys; their edits are in the weights, see `Editor.resume`."""
        ...

    def memory(self) -> dict[str, Tensor]:
        """What has to be kept beside the weights and the keys; see `Editor.memory`."""
        ...


def entrant_of(editor: Any, seed: int, ranks: Ranks = ALONE) -> Entrant:
    """The entrant that edits through ``editor``, a BaseEditor, with its share of the work among ``ranks``."""
    return OwnEntrant(editor, ranks) if isinstance(editor.apply_algo, Session) else HostEntrant(editor, seed)


def request_of(record: Record) -> dict[str, Any]:
    """EasyEdit's request."""
    return {"prompt": record.prompt, "subject": record.subject, "target_new": record.target_new}


class OwnEntrant:
    """This package's own editor.

    Args:
        editor: a BaseEditor for SPHERE, RECT or PRUNE.
        ranks: those that share the work; all of them call `prepare`, `aim`, `apply` and `resume` together.
    """

    def __init__(self, editor: Any, ranks: Ranks = ALONE) -> None:
        self.model, self.tokenizer = editor.model, editor.tok
        self.editor = editor.apply_algo.open(editor.model, editor.tok, editor.hparams)
        self.editor.join(ranks)
        self._names = {layer: rewrite.name for layer, rewrite in self.editor.anatomy.rewrites.items()}
        self._remembers = self.editor.config.base_method == "AlphaEdit"

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """Name -> live weight."""
        weights: Mapping[str, nn.Parameter] = self.editor.anatomy.weights
        return weights

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """The editor's, with master_copy."""
        copies: dict[str, Tensor] = self.editor.masters
        return copies

    def prepare(self) -> Sequence[str]:
        """Write the prefixes and count the key statistics."""
        self.editor.prepare()
        prefixes: Sequence[str] = self.editor.contexts.prefixes
        return prefixes

    def aim(self, records: Sequence[Record]) -> Aimed:
        """The targets of a batch for the weights as they are."""
        aimed: Aimed = self.editor.aim([request_of(record) for record in records])
        return aimed

    def aiming(self) -> str:
        """What the targets depend on beside the facts: the model and the settings of the search."""
        config = self.editor.config
        told = {name: getattr(config, name) for name in AIMING}
        return json.dumps(
            [fingerprint(self.editor.pretrained.tensors.items()), list(self.editor.contexts.prefixes), told]
        )

    def apply(self, records: Sequence[Record], number: int, aimed: Aimed | None = None) -> Done:
        """Write a batch."""
        report = self.editor.apply([request_of(record) for record in records], aimed)
        told = ("name", "rank", "removed_share", "solved_norm", "update_norm", "weight_norm") + (
            ("right_norm", "null_space", "rounding_loss", "master_gap")
        )
        return Done(
            layers=[{name: getattr(layer, name) for name in told} for layer in report.layers],
            updates={layer.name: layer.update for layer in report.layers},
            keys={self._names[layer]: keys for layer, keys in report.keys.items()} if self._remembers else {},
            losses=report.aimed.losses.tolist(),
            steps=report.aimed.steps.tolist(),
        )

    def resume(
        self, batches: Iterator[Mapping[str, Tensor]], memory: Mapping[str, Tensor], masters: Mapping[str, Tensor]
    ) -> None:
        """Learn the keys of earlier batches again, what the restraints knew, and the master copies."""
        nothing = torch.empty(0)  # MEMIT does not look at keys of earlier batches
        self.editor.resume(
            (
                {layer: keys[name] if self._remembers else nothing for layer, name in self._names.items()}
                for keys in batches
            ),
            masters,
        )
        self.editor.recall(memory)

    def memory(self) -> dict[str, Tensor]:
        """What the restraints know beside the weights."""
        kept: dict[str, Tensor] = self.editor.memory()
        return kept


class HostEntrant:
    """A method of EasyEdit, with or without restraints of ours.

    Random numbers are drawn from a seed of each batch, so that a run that was stopped goes on as it would have.

    Args:
        editor: a BaseEditor.
        seed: of the run.
    """

    def __init__(self, editor: Any, seed: int) -> None:
        self.model, self.tokenizer = editor.model, editor.tok
        self._hosted = Hosted(editor, seed)
        self._transposed = orientations(editor.model, self.weights)

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """Name -> live weight, of all that the method may write."""
        return self._hosted.weights

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """None: a method of EasyEdit has rounded what it wrote before anybody sees it."""
        return {}

    def prepare(self) -> Sequence[str]:
        """Have the method write its prefixes on the unedited model."""
        return self._hosted.prepare()

    def apply(self, records: Sequence[Record], number: int, aimed: Aimed | None = None) -> Done:
        """Write a batch, in one call where the method takes batches."""
        before = Snapshot.take(self.weights)
        shares = self._hosted.apply([request_of(record) for record in records], number)
        return Done([self._layer(name, old, shares.get(name)) for name, old in before.tensors.items()])

    def _layer(self, name: str, old: Tensor, told: Share | None) -> dict[str, Any]:
        live = self.weights[name].detach()
        old = neurons(old, self._transposed[name]).float()
        delta = neurons(live, self._transposed[name]).float() - old
        size = float(torch.linalg.vector_norm(delta))
        rank, removed, lost = told or (0, None, None)
        sizes = {"solved_norm": None, "update_norm": size, "weight_norm": float(torch.linalg.vector_norm(old))}
        return {"name": name, "rank": rank, "removed_share": removed, **sizes, "rounding_loss": lost}

    def resume(
        self, batches: Iterator[Mapping[str, Tensor]], memory: Mapping[str, Tensor], masters: Mapping[str, Tensor]
    ) -> None:
        """A method remembers nothing but the weights, or it is refused when a run starts; restraints of ours do."""
        self._hosted.recall(memory)

    def memory(self) -> dict[str, Tensor]:
        """What restraints remember of earlier batches beside the weights."""
        return self._hosted.memory()
