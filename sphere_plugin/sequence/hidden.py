"""What one batch did to one weight beside what it was for: interference, and both sides of the theorem."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.geometry.bound import bound_terms
from sphere_plugin.geometry.energy import unit_rows
from sphere_plugin.geometry.interference import EditingSpace, lengths, split
from sphere_plugin.sequence.protected import mean_square


@dataclass(frozen=True, eq=False)
class Step:
    """A weight [d_out, d_in] and what a batch did to it.

    Attributes:
        name: of the parameter.
        unedited: before the first edit.
        before: before the batch.
        after: after it.
        factors: the update as the journal has it; None where it is not stored in factors.
    """

    name: str
    unedited: Tensor
    before: Tensor
    after: Tensor
    factors: Factors | None

    def update(self) -> Factors:
        """ΔW in factors: those stored, or a singular value decomposition.

        Singular values that rounding the weight to its dtype could have made are left out of the latter.

        Raises:
            ModelError: it is not finite.
        """
        if self.factors is not None:
            return self.factors
        delta = self.after.double() - self.before.double()
        size = float(torch.linalg.vector_norm(self.after, dtype=torch.float64))
        return split(delta, floor=torch.finfo(self.after.dtype).eps / 2 * size)


@dataclass(frozen=True)
class Strength:
    """With what SPHERE would project: η, α, and whether of neurons at unit length."""

    eta: float
    alpha: float
    row_normalize: bool = True


def numbers(step: Step, keys: Mapping[str, Tensor], strength: Strength | None) -> dict[str, Any]:
    """Everything of one weight and batch, as docs/run-folder.md has it under `layers` of a diagnosis.

    Args:
        step: the weight before and after.
        keys: kind -> inputs of the weight [n, d_in].
        strength: also what the same update would do if SPHERE projected it; None: no.
    """
    told: dict[str, Any] = {"name": step.name, "theorem": {"batch": _theorem(step.before, step.after)}}
    told["theorem"]["run"] = _theorem(step.unedited, step.after)
    try:
        update = step.update()
    except ModelError as error:
        return told | {"missing": f"{error.culprit}: {error.got}"}
    space = EditingSpace.of(update)
    told |= _vectors(space) | {"factors": "svd" if step.factors is None else "journal"}
    told["inputs"] = {kind: {**_interference(space, one), **_outputs(step, update, one)} for kind, one in keys.items()}
    if strength is not None:
        told["projected"] = _projected(step, update, keys, strength)
    return told


def _projected(step: Step, update: Factors, keys: Mapping[str, Tensor], strength: Strength) -> dict[str, Any]:
    principal = PrincipalSpace.fit(step.before, strength.eta, strength.row_normalize)
    kept = EditingSpace.of(principal.project(update, strength.alpha))
    told = {**dataclasses.asdict(strength), "rank": principal.rank}
    share = principal.removed_share(update, strength.alpha)
    inputs = {kind: _interference(kept, one) for kind, one in keys.items()}
    return {**told, "removed_share": share, **_vectors(kept), "inputs": inputs}


def _vectors(space: EditingSpace) -> dict[str, Any]:
    """Norms of an update and of its vectors."""
    update = space.update
    told: dict[str, Any] = {"width": update.shape[1], "vectors": update.left.shape[1], "span": space.basis.shape[1]}
    for side, norms in (("left", lengths(update.left)), ("right", lengths(update.right))):
        told[side] = {"mean": float(norms.mean()), "max": float(norms.max()), "min": float(norms.min())}
    return {**told, "norm": update.norm(), "spectral": space.spectral}


def _interference(space: EditingSpace, keys: Tensor) -> dict[str, Any]:
    done = space.interference(keys)
    inside = float(done.inside.sum())
    return {
        "keys": keys.shape[0],
        "change": {"mean": float(done.change.mean()), "max": float(done.change.max())},
        "square": float(done.change.square().mean()),
        "bound": _against(done.change, done.bound),
        "spectral_bound": _against(done.change, done.spectral),
        "l_kp": inside,
        "l_kp_share": inside / (mean_square(keys) * keys.shape[0]),
        "alignment": space.alignment(keys),
    }


def _against(change: Tensor, bound: Tensor) -> dict[str, float]:
    """The mean of a bound, and the mean and the largest share of it that is reached; 0 where the bound is 0."""
    share = torch.where(bound > 0, change / bound, 0.0)
    return {"mean": float(bound.mean()), "reached": float(share.mean()), "most": float(share.max())}


def _outputs(step: Step, update: Factors, keys: Tensor) -> dict[str, Any]:
    """Changes against what the unedited weight makes of the inputs, of this batch and of all up to it."""
    unedited = step.unedited.float()
    whole = torch.linalg.vector_norm(keys @ unedited.T, dim=1)
    change = torch.linalg.vector_norm(keys @ update.right.float() @ update.left.float().T, dim=1)
    drift = torch.linalg.vector_norm(keys @ (step.after.float() - unedited).T, dim=1)
    relative = {"relative": float((change / whole).mean()), "drift_relative": float((drift / whole).mean())}
    return {"drift": float(drift.mean()), **relative}


def _theorem(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Both sides for the rows as they are, which the proof is about, and at unit length, which eq. 5 is about.

    What neurons at unit length have moved is no tangent of the sphere, so that nothing is said of its linear part.
    """
    told: dict[str, Any] = {}
    for kind, rows in (("raw", Tensor.double), ("unit", unit_rows)):
        try:
            terms = bound_terms(rows(before), rows(after))
        except ModelError as error:  # equal or zero rows, NaN
            told[kind] = {"missing": f"{error.culprit}: {error.got}"}
        else:
            derived = {"ratio": terms.ratio, "neuron_ratio": terms.neuron_ratio}
            told[kind] = dataclasses.asdict(terms) | derived
            if kind == "unit":
                del told[kind]["first_order"]
    return told
