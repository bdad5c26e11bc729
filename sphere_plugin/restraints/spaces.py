"""Principal spaces of pretrained weights, kept on disk: found once, and read by every later run.

A file is named by all that its space follows from: the weight's dtype, shape and bytes, η, whether rows are
normalised, the kind of device that computed it, and the format of the file. Whether an update is projected with a
space that was read or one that was found now, the result is the same bit for bit: U is stored as it lies in memory. A
file of another thread count or another release of torch may differ from what a fit would give now, by rounding.

Where neurons or inputs are fewer than `SMALLEST`, no file is made. On one core a space is read, the weight's digest
included, in 3 ms instead of 13 ms for 384 x 1024 and in 5 ms instead of 36 ms for 576 x 1536; what a first run spends
on writing, 2 to 5 ms with the digest on a fast disk and far more on a slow one, would cancel the smaller gain. For
2048 x 7168 it is 0.1 s instead of 1.4 s.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Final

from torch import Tensor

from sphere_plugin.files import cache_folder, fingerprint, read_tensors, write_tensors
from sphere_plugin.geometry import PrincipalSpace

_LOG = logging.getLogger("sphere_plugin")
_FORMAT: Final = 1  # raise it when files of an older code must not be used any more
SMALLEST: Final = 512  # rows and columns; with fewer, a fit costs little more than a file


class Spaces:
    """Finds principal spaces, in the cache where they were found before; says once if the cache takes no files."""

    def __init__(self) -> None:
        self._told = False

    def space_of(self, weight: Tensor, eta: float, row_normalize: bool) -> PrincipalSpace:
        """Returns the space of a weight that will be asked for again, with U formed.

        Args:
            weight: [d_out, d_in], rows are neurons.
            eta: as in `PrincipalSpace.fit`.
            row_normalize: as in `PrincipalSpace.fit`.

        Raises:
            ConfigError, ModelError: as `PrincipalSpace.fit`. A cache that cannot be read or written is no error.
        """
        if weight.is_meta or weight.dim() != 2 or min(weight.shape) < SMALLEST:
            return _found(weight, eta, row_normalize)
        identity = {
            "format": _FORMAT,
            "weight": fingerprint([("weight", weight)]),
            "eta": float(eta),
            "row_normalize": bool(row_normalize),
            "device": weight.device.type,
        }
        path, described = _path(identity), json.dumps(identity)
        space = _read(path, described, weight)
        if space is None:
            space = _found(weight, eta, row_normalize)
            self._keep(path, described, space)
        return space

    def _keep(self, path: Path, identity: str, space: PrincipalSpace) -> None:
        basis = space.basis
        turned = not basis.is_contiguous()  # LAPACK leaves it so, by columns
        tensors = {"basis": basis.T if turned else basis, "eigenvalues": space.eigenvalues}
        metadata = {"identity": identity, "total": repr(space.total), "turned": str(turned)}
        try:
            write_tensors(path, tensors, metadata)
        except OSError as error:  # CacheError is one, and some are none of its cases
            if not self._told:
                _LOG.warning("principal spaces are not kept, each run will find them anew: %s", error)
            self._told = True
        else:
            _LOG.info("the principal space of a pretrained weight is kept in %s", path)


def _found(weight: Tensor, eta: float, row_normalize: bool) -> PrincipalSpace:
    space = PrincipalSpace.fit(weight, eta, row_normalize=row_normalize)
    _ = space.basis  # it serves many updates, and is smaller than what it is made of
    return space


def _path(identity: dict[str, object]) -> Path:
    name = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / "spaces" / f"{name}.safetensors"


def _read(path: Path, identity: str, weight: Tensor) -> PrincipalSpace | None:
    """Returns the space that is kept in a file; None without one, and, with a warning, if it is not what it should be.

    Args:
        path: the file.
        identity: what has to stand in it.
        weight: [d_out, d_in], on whose device the space is wanted.
    """
    if not _exists(path):
        return None
    try:
        tensors, metadata = read_tensors(path)
    except OSError as error:
        _LOG.warning("the principal space of a pretrained weight is found anew: %s", error)
        return None
    if metadata.get("identity") != identity:
        _LOG.warning("the principal space of a pretrained weight is found anew: %s is another version's", path)
        return None
    # Copies: what safetensors reads lies in the file's memory, aligned otherwise than torch's own, and products of
    # numbers that are aligned otherwise may be rounded otherwise.
    basis, eigenvalues = (tensors[name].to(weight.device, copy=True) for name in ("basis", "eigenvalues"))
    basis = basis.T if metadata["turned"] == "True" else basis
    eta = float(json.loads(identity)["eta"])
    return PrincipalSpace(basis, eigenvalues, float(metadata["total"]), eta)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be looked into; the attempt to write there will tell
        return False
