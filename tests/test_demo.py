"""The demo from the command line, on pico models: two processes, a table, a figure, the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from conftest import pico_config
from pico import save_pico

from sphere_plugin.cli import main
from sphere_plugin.errors import ConfigError
from sphere_plugin.report import table
from sphere_plugin.sequence.demo import demo_hparams
from sphere_plugin.sequence.settings import check_schedule


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A YAML for a pico model in a folder whose name EasyEdit's loader knows."""
    config = pico_config("llama", base_method="MEMIT", mom2_n_samples=16)
    names = ("layers", "rewrite_module_tmp", "layer_module_tmp", "ln_f_module", "lm_head_module", "v_num_grad_steps")
    values = {name: getattr(config, name) for name in (*names, "mom2_n_samples", "context_template_length_params")}
    values |= {"alg_name": "SPHERE", "base_method": "MEMIT", "alpha": 1.0, "device": "cpu", "v_lr": 0.5}
    values["model_name"] = str(save_pico("llama", tmp_path / "pico-llama"))
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def demo(settings: Path, out: Path, *more: str) -> int:
    arguments = ["--edits", "4", "--batch-size", "2", "--checkpoints", "2,4", "--out", str(out), *more]
    return main(["demo", "--hparams", str(settings), *arguments])


def test_the_demo_leaves_a_table_a_figure_and_the_numbers(settings: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo(settings, Path("out"), "--model", "pico-llama") == 0
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(result["entries"]) == ["MEMIT", "MEMIT + SPHERE"]
    for checkpoints in result["entries"].values():
        assert [point["edits"] for point in checkpoints] == [0, 2, 4]
        for point in checkpoints:
            count = point["edits"]
            assert [len(point[name]) for name in ("efficacy", "generalization", "specificity")] == [count] * 3
            assert len(point["fresh"]) == count
            assert math.isfinite(point["nll"])
            assert all(len(values) == 2 for values in point["energy"].values())
    first, second = result["entries"].values()
    assert first[0] == second[0], "both start from the same model"
    assert first[2]["energy"] != second[2]["energy"], "SPHERE changed nothing"
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert table(result) in capsys.readouterr().out


def test_paths_are_those_of_the_folder_it_is_called_in(settings: Path, tmp_path: Path, monkeypatch) -> None:
    """The runs change their working directory, for EasyEdit writes its log there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("Some text.\n\nMore of it.", encoding="utf-8")
    content = yaml.safe_load(settings.read_text()) | {"mom2_dataset": "corpus.txt", "stats_dir": "statistics"}
    settings.write_text(yaml.safe_dump(content))
    hparams = demo_hparams(Path("pico.yaml"), "MEMIT", "pico-llama")
    assert hparams.model_name == str(tmp_path / "pico-llama")
    assert hparams.mom2_dataset == str(tmp_path / "corpus.txt")
    assert hparams.stats_dir == str(tmp_path / "statistics")
    assert demo_hparams(Path("pico.yaml"), "MEMIT", "some/hub-name").model_name == "some/hub-name"


def test_a_run_that_fails_ends_the_demo_with_its_reason(settings: Path, tmp_path: Path, capsys) -> None:
    """The step is so large that the update is not finite; statistics and data are fine."""
    content = yaml.safe_load(settings.read_text()) | {"v_lr": 1e38, "clamp_norm_factor": 1e38}
    settings.write_text(yaml.safe_dump(content))
    assert demo(settings, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "sphere: MEMIT" in error
    assert ".log" in error
    assert not (tmp_path / "out" / "demo.json").exists()


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--edits", "100000"], "at least 100000"),
        (["--checkpoints", "3"], "checkpoints"),
        (["--checkpoints", "two"], "--checkpoints"),
        (["--batch-size", "0"], "batch_size"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--hparams", "nowhere.yaml"], "nowhere.yaml"),
        (["--edits", "0"], "edits: got 0"),
        (["--edits", "-5"], "edits: got -5"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    more: list[str], culprit: str, settings: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("sphere_plugin.sequence.demo.register", lambda: pytest.fail("EasyEdit was loaded"))
    assert demo(settings, tmp_path / "out", *more) == 1
    assert culprit in capsys.readouterr().err


def test_a_checkpoint_between_batches_is_refused() -> None:
    check_schedule(5, 2, [2, 4, 5])
    for wrong in (3, 0, 6):
        with pytest.raises(ConfigError, match=f"checkpoints: got {wrong}"):
            check_schedule(5, 2, [wrong])
