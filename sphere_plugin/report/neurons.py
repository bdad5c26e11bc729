"""Neurons of an edited weight before and after: how alike they are, and where they lie (Figures 4, 5, 8 and 9)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sphere_plugin.errors import ConfigError, SphereError
from sphere_plugin.report.numbers import written
from sphere_plugin.report.read import Run
from sphere_plugin.report.studies import Entry, Study
from sphere_plugin.report.style import MUTED, Panel, Pen, Plate, colour

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    Rows = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float64]]

MOST: Final = 1000  # neurons looked at
PICTURED: Final = 256  # of them in a heatmap
FEWEST: Final = 5
SEED: Final = 0
COLOUR_MAP: Final = "magma"  # dark where neurons are unlike, as in the paper
SQUARE: Final = (3.4, 3.1)


@dataclass(frozen=True)
class Neurons:
    """The same neurons of one weight before and after the edits of one entry.

    Attributes:
        entry: whose.
        edits: how many were in the weights.
        before, after: [n, d_in], rows of unit length.
    """

    entry: Entry
    edits: int
    before: Rows
    after: Rows


@dataclass(frozen=True)
class Gathered:
    """What could be read of a study.

    Attributes:
        weight: its name.
        total: neurons it has.
        found: one for each entry that could be read.
        missing: why others could not.
        layers: numbers of those that were edited, as far as journals say.
    """

    weight: str
    total: int
    found: tuple[Neurons, ...]
    missing: tuple[str, ...]
    layers: tuple[int, ...]


def gather(study: Study, layer: int | None = None, most: int = MOST) -> Gathered:
    """Read the neurons of one weight for every entry; of several orders, the first.

    Args:
        study: whose entries.
        layer: its number; None: the last one that was edited.
        most: neurons to look at; more are sampled down to it, the same for all entries, seeded.

    Raises:
        CacheError: a journal is damaged.
    """
    weight, total, found, missing = "", 0, [], []
    known: set[str] = set()
    for entry in study.entries:
        before, after, edits, why = _weights(entry.runs[0], study.moment)
        if why:
            missing.append(f"{entry.label}: not available: {why}")
            continue
        known |= set(before)
        weight = weight or choose(list(before), layer)
        if weight not in before:
            missing.append(f"{entry.label}: not available: it did not edit {weight or f'layer {layer}'}")
            continue
        first, last = unit_rows(before[weight], most), unit_rows(after[weight], most)
        if first is None or last is None:
            missing.append(f"{entry.label}: not available: {weight} is not finite")
            continue
        total = before[weight].shape[0]
        found.append(Neurons(entry, edits, first, last))
    return Gathered(weight, total, tuple(found), tuple(missing), tuple(sorted(set(map(_layer, known)))))


def check_layer(gathered: Iterable[Gathered], layer: int | None) -> None:
    """Raise ConfigError unless a study has edited that layer; None, the last one of each, is always there."""
    known = {one for each in gathered for one in each.layers}
    if layer is not None and known and layer not in known:
        told = ", ".join(map(str, sorted(known)))
        raise ConfigError("--layer", layer, f"an edited layer: {told}", "Choose one of them.")


def choose(names: Sequence[str], layer: int | None) -> str:
    """Returns the weight of a layer, of the last one for None; nothing if there is none of that number."""
    wanted = max(map(_layer, names)) if layer is None else layer
    return next((name for name in names if _layer(name) == wanted), "")


def _layer(name: str) -> int:
    """The number of a weight's layer: the first one in its name."""
    found = re.search(r"\d+", name)
    return int(found.group()) if found else 0


def unit_rows(weight: Tensor, most: int = MOST) -> Rows | None:
    """Returns the rows of a weight [d_out, d_in] scaled to unit length, at most ``most`` of them, in their order.

    None if an entry is not finite. Rows of zeros stay.
    """
    import numpy

    rows = weight[sample(weight.shape[0], most)].double().numpy()
    if not numpy.isfinite(rows).all():
        return None
    unit: Rows = rows / numpy.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-300)
    return unit


def sample(count: int, most: int) -> list[int]:
    """Returns which of ``count`` neurons are looked at: all, or ``most`` of them at random, rising; seeded."""
    import numpy

    if count <= most:
        return list(range(count))
    return sorted(numpy.random.default_rng(SEED).choice(count, most, replace=False).tolist())


def similarity(rows: Rows) -> tuple[Rows, float]:
    """Returns the cosines of all pairs [n, n], and the mean of their absolute values off the diagonal."""
    import numpy

    cosines = rows @ rows.T
    count = len(rows)
    off = float(numpy.abs(cosines).sum() - numpy.abs(numpy.diag(cosines)).sum())
    return cosines, off / max(count * (count - 1), 1)


def embed(before: Rows, after: Rows) -> tuple[Rows, Rows]:
    """Returns the neurons before and after in one t-SNE of both, [n, 2] each; seeded."""
    import numpy
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]

    both = numpy.concatenate([before, after])
    perplexity = min(30.0, (len(both) - 1) / 3)
    places = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(both)
    return places[: len(before)], places[len(before) :]


def plates(study: Study, gathered: Gathered, tell: Callable[[str, int, int], None]) -> tuple[Plate, Plate]:
    """Returns the heatmaps and the t-SNE figure."""
    return _heatmaps(study, gathered), _places(study, gathered, tell)


def _weights(run: Run, moment: int | None) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], int, str]:
    """The weights with neurons as rows, before any edit and after the batch at ``moment`` or the last; or why not."""
    from sphere_plugin.journaling import Journal

    if not run.batches:
        return {}, {}, 0, "it has no journal"
    at_moment = [batch for batch in run.batches if batch.edits == moment]
    batch = (at_moment or list(run.batches))[-1]
    folder = run.folder / "journal"
    files = ["base.safetensors", *(f"{number:06d}.safetensors" for number in range(1, batch.batch + 1))]
    gone = next((name for name in files if not (folder / name).exists()), "")
    if gone:
        return {}, {}, 0, f"{gone} is not in its journal"
    try:
        journal = Journal.open(folder)
        states = journal.weights_after(0), journal.weights_after(batch.batch)
    except SphereError as error:
        if Path(error.culprit).exists():  # a damaged file; else the arithmetic of another machine
            raise
        return {}, {}, 0, str(error)
    before, after = (
        {name: weight.T if name in journal.transposed else weight for name, weight in one.items() if weight.dim() == 2}
        for one in states
    )
    return before, after, batch.edits, "" if before else "it edited no matrix"


def _heatmaps(study: Study, gathered: Gathered) -> Plate:
    import numpy

    name, title = f"{study.key}-cosines", "Cosine similarity of neurons, |cos|"
    if not gathered.found:
        return Plate(name, title, "", (), (), gathered.missing or ("not available: no journal",))
    panels, scale, reference = [], [], gathered.found[0]
    pictures: list[tuple[str, Rows, Entry | None]] = [("Unedited", reference.before, None)]
    pictures += [(f"{one.entry.label}, {one.edits} edits", one.after, one.entry) for one in gathered.found]
    for heading, rows, entry in pictures:
        cosines, mean = similarity(rows)
        part = sample(len(rows), PICTURED)
        picture = numpy.abs(cosines[numpy.ix_(part, part)])
        scale.append(picture[~numpy.eye(len(part), dtype=bool)])
        draw = partial(_draw_cosines, picture=picture, mean=mean)
        panels.append((heading, draw, entry))
    top = max(0.01, float(numpy.quantile(numpy.concatenate(scale), 0.995)))
    caption = (
        f"{gathered.weight}: {_how_many(gathered)}; {len(part)} of them pictured, the same in all. Dark: at "
        f"right angles, light: alike. All share one scale, cut at {written(top, 3)}. Below, the mean over all pairs."
    )
    drawn = tuple(Panel(heading, partial(draw, top=top), SQUARE, entry) for heading, draw, entry in panels)
    return Plate(name, title, caption, drawn, (), gathered.missing)


def _draw_cosines(pen: Pen, picture: Rows, mean: float, top: float) -> None:
    image = pen.axis.imshow(picture, cmap=COLOUR_MAP, vmin=0.0, vmax=top, interpolation="none")
    pen.axis.set_xticks([])
    pen.axis.set_yticks([])
    pen.axis.spines[:].set_visible(False)
    pen.axis.set_xlabel(f"mean |cos| {written(mean, 4)}")
    bar = pen.axis.figure.colorbar(image, ax=pen.axis, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)


def _places(study: Study, gathered: Gathered, tell: Callable[[str, int, int], None]) -> Plate:
    name, title = f"{study.key}-tsne", "Where neurons lie before and after"
    panels, missing = [], list(gathered.missing)
    for one in gathered.found:
        tell("t-SNE", 1, len(gathered.found))
        if len(one.before) < FEWEST:
            missing.append(f"{one.entry.label}: not available: {len(one.before)} neurons are too few")
            continue
        places = embed(one.before, one.after)
        heading = f"{one.entry.label}, {one.edits} edits"
        panels.append(Panel(heading, partial(_draw_places, places=places, entry=one.entry), SQUARE, one.entry))
    if not panels:
        return Plate(name, title, "", (), (), tuple(missing) or ("not available: no journal",))
    caption = (
        f"{gathered.weight}: {_how_many(gathered)}. One t-SNE for each method of its neurons before (grey, larger) "
        f"and after (coloured), scaled to unit length; perplexity at most 30, seed {SEED}. Above and right, densities "
        "along each axis. Distances between clusters mean little in a t-SNE; look at how far the two colours part."
    )
    return Plate(name, title, caption, tuple(panels), (), tuple(missing))


def _draw_places(pen: Pen, places: tuple[Rows, Rows], entry: Entry) -> None:
    axis = pen.axis
    colours = (MUTED, colour(entry))
    size = min(4.0, max(1.6, 60.0 / len(places[0]) ** 0.5))
    for points, ink, wider in zip(places, colours, (1.8, 1.0), strict=True):
        axis.plot(points[:, 0], points[:, 1], "o", markersize=wider * size, color=ink, alpha=0.6, markeredgewidth=0)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.set_title(axis.get_title(loc="left"), y=1.17)
    for side, box in enumerate(([0.0, 1.02, 1.0, 0.14], [1.02, 0.0, 0.14, 1.0])):
        margin = axis.inset_axes(box)
        margin.set_axis_off()
        for points, ink in zip(places, colours, strict=True):
            _density(margin, points[:, side], axis.get_xlim() if side == 0 else axis.get_ylim(), ink, side)


def _density(margin: Any, values: Any, limits: tuple[float, float], ink: str, side: int) -> None:
    import numpy
    from scipy.stats import gaussian_kde

    grid = numpy.linspace(*limits, 100)
    if numpy.ptp(values) == 0:
        return
    heights = gaussian_kde(values)(grid)
    first, second = (grid, heights) if side == 0 else (heights, grid)
    margin.plot(first, second, color=ink, linewidth=1.2)
    (margin.set_xlim if side == 0 else margin.set_ylim)(*limits)


def _how_many(gathered: Gathered) -> str:
    looked_at = len(gathered.found[0].before)
    if looked_at == gathered.total:
        return f"all {looked_at} neurons"
    return f"{looked_at} of {gathered.total} neurons (random, seed {SEED})"
