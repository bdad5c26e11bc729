"""What a batch did to its weights: how it is stored, and how the weights are computed again from it, bit for bit.

A weight that a batch changed is stored in one of two ways, whichever takes less room; in place of one that has a
float32 master copy stands the copy:

    NAME/whole                      the weight after the batch
    NAME/left, NAME/right           factors of the update, float32; W ← round(W + left rightᵀ)
    NAME/places, NAME/values        entries where that sum, taken on a CPU, differs from what was written, on a GPU
                                    for instance: their positions in the flat weight, and what they are
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors, neurons
from sphere_plugin.geometry.neurons import is_transposed, stored

# An update as a batch reports it: only factors take less room than the weight itself.
Update = Factors | Tensor

_INTEGERS: Final = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})


def orientations(model: nn.Module, names: Mapping[str, object]) -> dict[str, bool]:
    """For each parameter of ``model``, whether it is a matrix that is stored as [d_in, d_out]."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return {n: model.get_parameter(n).dim() == 2 and is_transposed(owner) for n, owner in owners.items()}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size and shape: for them, unlike for floats, −0 ≠ 0 and NaN = NaN."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def encode(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    updates: Mapping[str, Update],
    transposed: frozenset[str],
) -> dict[str, Tensor]:
    """What to store of a batch.

    Args:
        before: name -> the weight before it, as the model stores it, on the CPU.
        after: name -> the weight after it, likewise. What it did not change is not stored.
        updates: name -> ΔW [d_out, d_in], where it is at hand.
        transposed: names of the weights that are stored as [d_in, d_out].
    """
    entries: dict[str, Tensor] = {}
    for name, new in after.items():
        if not same_bits(before[name], new):
            update = updates.get(name)
            thin = _thin(name, before[name], new, update, name in transposed) if isinstance(update, Factors) else {}
            entries |= thin or {f"{name}/whole": new}
    return entries


def replayed(name: str, weight: Tensor, entries: Mapping[str, Tensor], transposed: bool) -> Tensor:
    """The weight after a batch, from the ``weight`` before it; both as the model stores it, on the CPU."""
    whole = entries.get(f"{name}/whole")
    if whole is not None:
        return whole
    if f"{name}/left" not in entries:
        return weight  # the batch did not change it
    new = _edited(weight, Factors(entries[f"{name}/left"], entries[f"{name}/right"]), transposed)
    if f"{name}/places" in entries:
        new.view(-1)[entries[f"{name}/places"].long()] = entries[f"{name}/values"]
    return new


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Compute on so many threads of torch while the block runs: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _edited(weight: Tensor, update: Factors, transposed: bool) -> Tensor:
    """In the arithmetic of SPHERE's editor, from memory that is laid out alike each time: sums depend on that, too."""
    left, right = (side.clone(memory_format=torch.contiguous_format) for side in (update.left, update.right))
    edited = (neurons(weight, transposed).float() + Factors(left, right).dense()).to(weight.dtype)
    return stored(edited, transposed).contiguous()


def _thin(name: str, before: Tensor, after: Tensor, update: Factors, transposed: bool) -> dict[str, Tensor]:
    """The update as factors, and what they miss; empty if the whole weight takes no more room."""
    factors = Factors(update.left.detach(), update.right.detach()).to("cpu", torch.float32)
    if before.dtype != after.dtype or _size(factors.left, factors.right) >= _size(after):
        return {}
    expected = tuple(neurons(after, transposed).shape)
    if factors.shape != expected:
        remedy = "Pass the update of this weight, rows = neurons, however the model stores it."
        raise ModelError(f"update of {name}", factors.shape, f"the shape {expected}", remedy)
    missed = bits(_edited(before, factors, transposed)) != bits(after)
    entries = {f"{name}/left": factors.left, f"{name}/right": factors.right}
    if bool(missed.any()):
        places = missed.view(-1).nonzero().view(-1)
        entries[f"{name}/values"] = after.reshape(-1)[places]
        entries[f"{name}/places"] = places.int() if after.numel() < 2**31 else places
    return entries if _size(*entries.values()) < _size(after) else {}


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
