"""One self-contained HTML page of runs, and its figures, tables and numbers beside it as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sphere_plugin._version import __version__
from sphere_plugin.errors import ConfigError, HostError
from sphere_plugin.files import check_writable, write_bytes, write_json
from sphere_plugin.report import bars, cases, comparison, curves, diagnostics, neurons, paired, published, scatter
from sphere_plugin.report.grid import Grid
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import Study, studies_of
from sphere_plugin.report.style import Plate, alone, picture, sheet
from sphere_plugin.report.svg import svg, themes

PAGE: Final = "report.html"
NUMBERS: Final = "report.json"
TEMPLATE: Final = "page.html.j2"


@dataclass(frozen=True)
class Options:
    """What can be chosen.

    Attributes:
        at: after how many edits the table compares; None: the last moment that all entries have.
        layer: whose neurons are shown; None: the last edited one.
        neurons: how many of them at most.
        texts: whether what the models write is shown, which holds prompts of the data.
    """

    at: int | None = None
    layer: int | None = None
    neurons: int = neurons.MOST
    texts: bool = True

    def __post_init__(self) -> None:
        if self.neurons < 2:
            raise ConfigError("--neurons", self.neurons, "2 or more", f"Leave it out for {neurons.MOST}.")


@dataclass(frozen=True)
class Chapter:
    """A study as the page and the files show it."""

    study: Study
    plates: Mapping[str, Plate]
    grids: Mapping[str, Grid]
    tests: Sequence[paired.Comparison]
    texts: bool


def write_report(
    paths: Sequence[Path],
    out: Path,
    options: Options | None = None,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Write the report of all runs in ``paths`` into the folder ``out``.

    Args:
        paths: run folders, or folders of them.
        out: is made if it is not there; files of an earlier report in it are replaced.
        options: see `Options`.
        tell: called with (what, done now, of how many) while it takes long.

    Returns:
        The page.

    Raises:
        ConfigError: there are no runs, or an option fits none of them.
        CacheError: a file of a run is damaged, or ``out`` cannot be written.
        HostError: a library of the extra `report` is missing.
    """
    check_libraries()
    options = options or Options()
    studies = studies_of(read_runs(paths), options.at)
    check_writable(out / PAGE)
    chapters = [chapter(study, options, tell) for study in studies]
    for one in chapters:
        _write_files(one, out, tell)
    text = html(chapters)
    write_json(out / NUMBERS, numbers(studies))
    write_bytes(out / PAGE, text.encode())
    return out / PAGE


def check_libraries() -> None:
    """Raises HostError, naming what is missing, unless everything a report needs is installed."""
    from importlib.util import find_spec

    missing = [name for name in ("jinja2", "matplotlib", "scipy", "sklearn") if find_spec(name) is None]
    if missing:
        remedy = "Install them: pip install 'sphere-plugin[report]'."
        raise HostError("the libraries of `sphere report`", f"no {', no '.join(missing)}", "all of them", remedy)


def chapter(study: Study, options: Options, tell: Callable[[str, int, int], None]) -> Chapter:
    """Compute everything about one study."""
    gathered = neurons.gather(study, options.layer, options.neurons)
    cosines, places = neurons.plates(study, gathered, tell)
    plates = {
        "curves": curves.plate(study),
        "scatter": scatter.plate(study),
        "bars": bars.plate(study),
        "cosines": cosines,
        "tsne": places,
        "batches": diagnostics.plate(study),
    }
    tests = paired.comparisons(study)
    grids = {
        "points": curves.points_grid(study),
        "spearman": curves.correlations_grid(study),
        "regression": scatter.grid(study),
        "bars": bars.grid(study),
        "paired": paired.grid(study, tests),
    }
    return Chapter(study, plates, grids, tests, options.texts)


def numbers(studies: Iterable[Study]) -> dict[str, Any]:
    """Returns the numbers of the comparison tables, unrounded and as they are written."""
    return {
        "sphere_plugin": __version__,
        "studies": [
            {
                "model": study.model,
                "data": study.data,
                "edits": study.moment,
                "batch_size": study.batch_size,
                "protocol": dict(study.protocol),
                "notes": comparison.notes(study),
                "table": comparison.table_json(study),
            }
            for study in studies
        ],
    }


def html(chapters: Sequence[Chapter]) -> str:
    """Returns the page. Whatever comes from a run is escaped by the template, or by the XML of a figure."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def charts(plate: Plate) -> list[tuple[Any, Markup]]:
        drawn = []
        for number, panel in enumerate(plate.panels):
            figure, tips = alone(panel)
            drawn.append((panel.entry, Markup(svg(figure, f"{plate.name}-{number}", panel.title, tips))))
        return drawn

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light, dark = themes()
    studies = [one.study for one in chapters]
    return environment.get_template(TEMPLATE).render(
        chapters=[_context(one, charts) for one in chapters],
        numbers=json.dumps(numbers(studies), ensure_ascii=False).replace("<", "\\u003c"),
        runs=sum(len(entry.runs) for study in studies for entry in study.entries),
        light=light,
        dark=dark,
        version=__version__,
    )


def _context(one: Chapter, charts: Callable[[Plate], Any]) -> dict[str, Any]:
    study = one.study
    block = published.published(study.preset, study.data)
    return {
        "study": study,
        "rows": comparison.rows(study),
        "metrics": study.metrics(),
        "notes": comparison.notes(study),
        "plates": {name: (plate, charts(plate)) for name, plate in one.plates.items()},
        "grids": one.grids,
        "gains": bars.gains(study),
        "certain": {(test.entry.slot, test.base.slot, test.metric.name) for test in one.tests if test.clear},
        "texts": one.texts,
        "cases": cases.cases(study) if one.texts else [],
        "published": block,
        "source": published.SOURCE,
        "manifests": [
            (entry, run, json.dumps(without_folders(run.manifest), indent=2, ensure_ascii=False))
            for entry in study.entries
            for run in entry.runs
        ],
    }


def without_folders(value: Any) -> Any:
    """Returns JSON with only the last part of every absolute path in it: where files lay is nobody else's business."""
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _write_files(one: Chapter, out: Path, tell: Callable[[str, int, int], None]) -> None:
    study = one.study
    drawn = [plate for plate in one.plates.values() if plate.panels]
    for plate in drawn:
        figure = sheet(plate)
        for kind in ("png", "pdf"):
            write_bytes(out / f"{plate.name}.{kind}", picture(figure, kind))
        tell("figures", 1, len(drawn))
    for grid in one.grids.values():
        write_bytes(out / f"{grid.name}.csv", grid.csv().encode())
    write_bytes(out / f"{study.key}-table.csv", comparison.table_csv(study).encode())
    write_bytes(out / f"{study.key}-table.tex", comparison.table_latex(study).encode())
    write_bytes(out / f"{study.key}-batches.csv", diagnostics.batches_csv(study).encode())
    write_bytes(out / f"{study.key}-scores.csv", paired.scores_csv(study).encode())
