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
from sphere_plugin.paths import without_folders
from sphere_plugin.report import (
    abilities,
    audit,
    bars,
    cases,
    comparison,
    curves,
    diagnosed,
    diagnostics,
    interference,
    neurons,
    paired,
    published,
    scatter,
    theorem,
)
from sphere_plugin.report.grid import Grid
from sphere_plugin.report.read import read_runs
from sphere_plugin.report.studies import Study, studies_of
from sphere_plugin.report.style import Plate, alone, picture, sheet
from sphere_plugin.report.svg import svg, themes
from sphere_plugin.report.sweep import find_sweeps
from sphere_plugin.report.swept import SweepChapter, chapters_of, context

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
        paths: run folders, or folders of them. Runs in the folder of a sweep are its cells and make up no study.
        out: is made if it is not there; files of an earlier report in it are replaced.
        options: see `Options`.
        tell: called with (what, done now, of how many) while it takes long.

    Returns:
        The page.

    Raises:
        ConfigError: there are no runs, no study has the layer or the moment of the options, or a sweep has not that
            moment.
        CacheError: a file of a run is damaged, or ``out`` cannot be written.
        HostError: a library of the extra `report` is missing.
    """
    check_libraries()
    options = options or Options()
    folders = find_sweeps(paths)
    runs = read_runs(paths, folders)
    studies = studies_of(runs, options.at) if runs else ()
    check_writable(out / PAGE)
    sweeps = chapters_of(folders, options.at, tell)
    gathered = [neurons.gather(study, options.layer, options.neurons) for study in studies]
    neurons.check_layer(gathered, options.layer)
    chapters = [chapter(study, one, options, tell) for study, one in zip(studies, gathered, strict=True)]
    for one in chapters:
        _write_files(one, out, tell)
    for swept in sweeps:
        _write_plates(swept.plates, swept.grids, out, tell)
    text = html(chapters, sweeps)
    write_json(out / NUMBERS, numbers(studies, sweeps))
    write_bytes(out / PAGE, text.encode())
    return out / PAGE


def check_libraries() -> None:
    """Raises HostError, naming what is missing, unless everything a report needs is installed."""
    from importlib.util import find_spec

    missing = [name for name in ("jinja2", "matplotlib", "scipy", "sklearn") if find_spec(name) is None]
    if missing:
        remedy = "Install them: pip install 'sphere-plugin[report]'."
        raise HostError("the libraries of `sphere report`", f"no {', no '.join(missing)}", "all of them", remedy)


def chapter(
    study: Study, gathered: neurons.Gathered, options: Options, tell: Callable[[str, int, int], None]
) -> Chapter:
    """Compute everything about one study, whose neurons have been read."""
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
    hidden = diagnosed.gather(study)
    if hidden:
        plates |= {"theorem": theorem.plate(study, hidden), "interference": interference.plate(study, hidden)}
        grids |= {"theorem": theorem.grid(study, hidden), "violations": theorem.violations(study, hidden)}
        grids |= {"interference": interference.grid(study, hidden), "spaces": interference.spaces(study, hidden)}
        grids["diagnoses"] = diagnosed.grid(study, hidden)
    grids |= audit.grids(study)
    able = abilities.gather(study)
    if able:
        plates["abilities"] = abilities.plate(study, able)
        grids |= {"abilities": abilities.grid(study, able), "able": abilities.tests(study, able)}
    return Chapter(study, plates, grids, tests, options.texts)


def numbers(studies: Iterable[Study], sweeps: Iterable[SweepChapter] = ()) -> dict[str, Any]:
    """Returns the numbers of the comparison tables, unrounded and as they are written, and those of sweeps."""
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
        "sweeps": [one.told for one in sweeps],
    }


def html(chapters: Sequence[Chapter], sweeps: Sequence[SweepChapter] = ()) -> str:
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
    swept = [one.sweep.study for one in sweeps]
    return environment.get_template(TEMPLATE).render(
        chapters=[_context(one, charts) for one in chapters],
        sweeps=[context(one, charts) for one in sweeps],
        models=list(dict.fromkeys(study.model for study in (*studies, *swept))),
        numbers=json.dumps(numbers(studies, sweeps), ensure_ascii=False).replace("<", "\\u003c"),
        runs=len({run.folder for study in (*studies, *swept) for entry in study.entries for run in entry.runs}),
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


def _write_files(one: Chapter, out: Path, tell: Callable[[str, int, int], None]) -> None:
    study = one.study
    _write_plates(one.plates, one.grids, out, tell)
    write_bytes(out / f"{study.key}-table.csv", comparison.table_csv(study).encode())
    write_bytes(out / f"{study.key}-table.tex", comparison.table_latex(study).encode())
    write_bytes(out / f"{study.key}-batches.csv", diagnostics.batches_csv(study).encode())
    write_bytes(out / f"{study.key}-scores.csv", paired.scores_csv(study).encode())


def _write_plates(
    plates: Mapping[str, Plate], grids: Mapping[str, Grid], out: Path, tell: Callable[[str, int, int], None]
) -> None:
    drawn = [plate for plate in plates.values() if plate.panels]
    for plate in drawn:
        figure = sheet(plate)
        for kind in ("png", "pdf"):
            write_bytes(out / f"{plate.name}.{kind}", picture(figure, kind))
        tell("figures", 1, len(drawn))
    for grid in grids.values():
        write_bytes(out / f"{grid.name}.csv", grid.csv().encode())
