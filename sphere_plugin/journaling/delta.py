"""Edits as one file that turns the unedited model's weights into the edited ones, and back, bit for bit.

For every weight the file holds the exclusive or (XOR) of its bits before and after. XOR is its own inverse: the same
file takes the edits back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from sphere_plugin.errors import CacheError, ModelError
from sphere_plugin.files import fingerprint, read_tensors, write_tensors
from sphere_plugin.journaling.batch import bits
from sphere_plugin.journaling.snapshot import all_or_nothing
from sphere_plugin.parsing import json_of

_FORMAT: Final = "sphere-delta-1"


def write_delta(
    path: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor], about: Mapping[str, str]
) -> None:
    """Write what turns ``before`` into ``after`` (name -> weight as the model stores it, of the same dtype).

    Args:
        path: the file to make.
        before: the unedited weights, on the CPU.
        after: the edited ones, of the same names.
        about: what else to put into the file's metadata.

    Raises:
        ModelError: the dtype of a weight has changed.
    """
    cast = [name for name in before if before[name].dtype != after[name].dtype]
    if cast:
        remedy = "The method cast the model; export it as a whole."
        raise ModelError(cast[0], f"{after[cast[0]].dtype}", f"{before[cast[0]].dtype}, as before the edits", remedy)
    prints = {name: (_print(name, before[name]), _print(name, after[name])) for name in before}
    metadata = {**about, "format": _FORMAT, "fingerprints": json.dumps(prints)}
    write_tensors(path, {name: bits(before[name]) ^ bits(after[name]) for name in before}, metadata)


def apply_delta(model: nn.Module, path: Path, revert: bool = False) -> Mapping[str, str]:
    """Edit ``model`` in place with a file that ``sphere export --format delta`` wrote; ``revert`` takes that back.

    Args:
        model: the one the edits were made on, unedited, in the same dtype; with ``revert`` the edited one.
        path: the file.
        revert: from edited to unedited weights.

    Returns:
        What the file says about its edits: their number, the method, the name of the model.

    Raises:
        CacheError: the file cannot be read, or is damaged.
        ModelError: the model is another one, edited otherwise, or in another dtype. Nothing is changed.
    """
    differences, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT:
        remedy = "Make one with `sphere export --format delta`."
        raise ModelError(str(path), metadata.get("format"), f"a file of the format {_FORMAT}", remedy)
    prints = _prints(path, metadata, differences)
    parameters = dict(model.named_parameters())
    live = {name: parameters[name] for name in prints if name in parameters}
    _check(live, prints, 1 if revert else 0)
    with torch.no_grad(), all_or_nothing(live):
        for name, weight in live.items():
            flat, difference = bits(weight.detach()), differences[name]
            if difference.dtype != flat.dtype or difference.shape != flat.shape:
                raise _other(path, f"{difference.dtype} of shape {tuple(difference.shape)} for {name}")
            flat.bitwise_xor_(difference.to(flat.device))
            if _print(name, weight) != prints[name][0 if revert else 1]:
                raise _other(path, f"differences of {name} that lead elsewhere than it says")
    return {key: value for key, value in metadata.items() if key not in ("format", "fingerprints")}


def _prints(path: Path, metadata: Mapping[str, str], differences: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name -> fingerprints of the weight before and after the edits, as the file has them."""
    try:
        prints = json_of(metadata.get("fingerprints", ""))
    except ValueError as error:
        raise _other(path, f"fingerprints that are none ({error})") from error
    pairs = isinstance(prints, dict) and all(isinstance(one, list) and len(one) == 2 for one in prints.values())
    if not pairs or set(prints) != set(differences):
        raise _other(path, "fingerprints of other weights than it has")
    found: dict[str, list[str]] = prints
    return found


def _other(path: Path, got: str) -> CacheError:
    return CacheError(str(path), got, "a file as `sphere export --format delta` writes it", "Export it again.")


def _check(live: Mapping[str, Tensor], prints: Mapping[str, Sequence[str]], side: int) -> None:
    """Raise ModelError unless the weights are those before (``side`` 0) or after (1) the edits."""
    now = {name: _print(name, weight) for name, weight in live.items()}
    wrong = [name for name in prints if now.get(name) != prints[name][side]]
    if not wrong:
        return
    expected = "the edited weights" if side else "the unedited weights the edits were made on"
    if all(now.get(name) == prints[name][1 - side] for name in prints):
        already = "not edited" if side else "edited already"
        remedy = "Nothing has to be taken back." if side else "Call it with revert=True to take the edits back."
        raise ModelError("the model", already, expected, remedy)
    first = wrong[0]
    what = f"{live[first].dtype} of shape {tuple(live[first].shape)}" if first in live else "not there"
    remedy = f"{len(wrong)} of {len(prints)} weights differ. Load that model, in the dtype it was edited in."
    raise ModelError(first, what, expected, remedy)


def _print(name: str, weight: Tensor) -> str:
    return fingerprint([(name, weight)])
