"""Key statistics that EasyEdit or ROME has counted, read from their files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sphere_plugin.errors import ConfigError


def read_counted(path: Path, width: int) -> Tensor:
    """E[kkᵀ] [width, width] float32 of one layer, from a file of EasyEdit's or ROME's ``layer_stats``.

    Raises:
        ConfigError: no such file, or not one of these statistics of a key of ``width`` dimensions.
    """
    expected = f"a file of EasyEdit's layer_stats over keys of {width} dimensions"
    remedy = "Put {} for the layer number into the name, and name the statistics of this very model."
    try:
        with np.load(path, allow_pickle=False) as content:
            moment, count = torch.from_numpy(content["mom2.mom2"]).double(), int(content["mom2.count"])
    except (
        OSError,
        EOFError,
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        OverflowError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ConfigError("mom2_dataset", str(path), f"{expected} ({error})", remedy) from error
    moment /= max(count, 1)
    if moment.shape != (width, width) or not bool(torch.isfinite(moment).all()) or count < 1:
        got = f"{path}: {tuple(moment.shape)} over {count} tokens"
        raise ConfigError("mom2_dataset", got, expected, remedy)
    return moment.float()
