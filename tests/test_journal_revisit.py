"""The model of a run that is over, at any of its moments."""

from __future__ import annotations

import pytest
from pico import save_pico
from pico_runs import place, prints, settings

from sphere_plugin.errors import CacheError, ConfigError, ModelError
from sphere_plugin.files import read_json, write_json
from sphere_plugin.journaling.revisit import Revisited
from sphere_plugin.sequence.runner import start


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("revisit")
    start(settings(place(folder), "memit+sphere", edits=6, checkpoints=[]), folder / "run")
    return folder / "run"


def test_every_moment_is_what_it_was(run) -> None:
    seen = Revisited(run)
    assert seen.edits == 6
    after = prints(run)
    for number in (3, 1, 2):  # in any order
        seen.go(2 * number)
        assert seen.journal.edits(number) == 2 * number
        assert seen.journal.fingerprint_of(seen.weights) == after[number - 1]
    seen.go(0)
    assert seen.journal.fingerprint_of(seen.weights) == seen.manifest["model"]["weights"]


def test_what_is_no_moment_is_refused(run) -> None:
    with pytest.raises(ConfigError, match="5"):
        Revisited(run).go(5)


def test_another_model_is_refused(run, tmp_path) -> None:
    with pytest.raises(ModelError, match="fingerprint"):
        Revisited(run, str(save_pico("llama", tmp_path / "other", seed=1)))


def test_a_manifest_of_another_run_is_refused(run, tmp_path) -> None:
    (tmp_path / "journal").symlink_to(run / "journal")
    manifest = read_json(run / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"model": {**manifest["model"], "weights": "0" * 32}})
    with pytest.raises(CacheError, match="not of one run"):
        Revisited(tmp_path)
