"""Principal spaces of pretrained weights in the cache: the same as found anew, and never another weight's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import REQUESTS
from torch import Tensor

from sphere_plugin.errors import ModelError
from sphere_plugin.files import read_tensors, write_tensors
from sphere_plugin.geometry import Factors, PrincipalSpace
from sphere_plugin.restraints import SphereConfig, restrain, spaces
from sphere_plugin.restraints.spaces import Spaces

CONFIG = SphereConfig(eta=0.4, alpha=0.7, basis="pretrained")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, DELTA = normal(24, 60), normal(24, 60, seed=1)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of spaces, empty, for weights of any size."""
    monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spaces, "SMALLEST", 8)
    return tmp_path / "cache" / "spaces"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every decomposition."""
    done: list[int] = []
    original = PrincipalSpace.fit
    monkeypatch.setattr(PrincipalSpace, "fit", lambda *args, **more: done.append(1) or original(*args, **more))
    return done


def projected(weight: Tensor = WEIGHT, config: SphereConfig = CONFIG, delta: Tensor = DELTA) -> Tensor:
    """As a run of its own would have it: nothing is known but what the cache holds."""
    return config.bind(weight)(torch.zeros_like(weight), delta).delta


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("shape", [(24, 60), (40, 40), (60, 24), (600, 1100)], ids=["wide", "square", "tall", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_space_that_was_read_is_the_one_that_was_found(
    shape: tuple[int, int], dtype: torch.dtype, eta: float, cache: Path, fits: list[int]
) -> None:
    weight, delta = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    update = Factors(normal(shape[0], 3, seed=2).to(dtype), normal(shape[1], 3, seed=3).to(dtype))
    fresh = PrincipalSpace.fit(weight, eta)
    _ = fresh.basis
    for run in range(2):
        space = Spaces().space_of(weight, eta, True)
        assert len(fits) == 2, run
        assert torch.equal(space.basis, fresh.basis) and space.basis.stride() == fresh.basis.stride()
        assert torch.equal(space.eigenvalues, fresh.eigenvalues)
        assert (space.basis.dtype, space.total, space.eta) == (fresh.basis.dtype, fresh.total, eta)
        assert torch.equal(space.project(delta, 0.7), fresh.project(delta, 0.7))
        assert torch.equal(space.project(update, 0.7).right, fresh.project(update, 0.7).right)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("factored", [False, True])
def test_a_later_run_reads_what_an_earlier_one_found(factored: bool, cache: Path, fits: list[int]) -> None:
    update = Factors(normal(24, 3, seed=2), normal(60, 3, seed=3)) if factored else DELTA
    results = [restrain(CONFIG.bind(WEIGHT), WEIGHT + 1, update) for _ in range(2)]
    expected = PrincipalSpace.fit(WEIGHT, CONFIG.eta).project(update, CONFIG.alpha)
    assert len(fits) == 2  # the first run's and the line above
    for result in results:
        dense = [x.dense() if isinstance(x, Factors) else x for x in (result.delta, expected)]
        torch.testing.assert_close(*dense)
    assert results[0].removed_share == results[1].removed_share and results[0].rank == results[1].rank > 0


def test_any_alpha_and_any_layout_of_the_weight_are_served_by_one_file(cache: Path, fits: list[int]) -> None:
    stored = WEIGHT.T.contiguous()  # as GPT-2 has it
    for alpha, weight in ((0.3, WEIGHT), (0.9, WEIGHT), (0.7, stored.T)):
        projected(weight, SphereConfig(0.4, alpha, "pretrained"))
    assert len(fits) == len(list(cache.iterdir())) == 1


OTHERS = {
    "eta": (WEIGHT, SphereConfig(eta=0.5, basis="pretrained")),
    "row_normalize": (WEIGHT, SphereConfig(eta=0.4, basis="pretrained", row_normalize=False)),
    "one bit": (torch.where(torch.arange(60) == 7, WEIGHT.nextafter(WEIGHT + 1), WEIGHT), CONFIG),
    "dtype": (WEIGHT.bfloat16(), CONFIG),
    "shape": (WEIGHT.reshape(20, 72), CONFIG),
}


@pytest.mark.parametrize("other", OTHERS)
def test_weights_and_settings_that_differ_have_files_that_differ(other: str, cache: Path, fits: list[int]) -> None:
    weight, config = OTHERS[other]
    projected()
    for _ in range(2):
        space = Spaces().space_of(weight, config.eta, config.row_normalize)
    assert len(fits) == len(list(cache.iterdir())) == 2
    assert torch.equal(space.basis, PrincipalSpace.fit(weight, config.eta, config.row_normalize).basis)


def test_equal_numbers_in_two_dtypes_have_two_files(cache: Path, fits: list[int]) -> None:
    half = WEIGHT.bfloat16()
    assert torch.equal(projected(half), projected(half.float()))
    assert len(fits) == len(list(cache.iterdir())) == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def of_another_version(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "identity": metadata["identity"].replace('"format": 1', '"format": 0')})


def of_another_weight(path: Path) -> None:
    projected(2 * WEIGHT + 1)
    (other,) = set(path.parent.iterdir()) - {path}
    other.replace(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, of_another_version, of_another_weight])
def test_a_file_that_is_not_what_it_should_be_is_made_again(
    damage, cache: Path, fits: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = projected()
    (path,) = cache.iterdir()
    damage(path)
    done = len(fits)
    assert torch.equal(projected(), expected)
    (warning,) = warnings(caplog)
    assert "found anew" in warning and str(path) in warning
    assert torch.equal(projected(), expected)
    assert len(fits) == done + 1 and len(warnings(caplog)) == 1


def test_a_cache_that_takes_no_files_is_told_once_and_no_failure(
    cache: Path, fits: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = projected()
    cache.rename(cache.with_name("away"))
    cache.write_text("a file where the folder should be")
    restraint = SphereConfig(eta=0.4, alpha=0.7, basis="pretrained")
    for weight in (WEIGHT, WEIGHT + 1, WEIGHT + 2):
        bound = restraint.bind(weight)
        for _ in range(2):
            result = bound(weight, DELTA)
        if weight is WEIGHT:
            assert torch.equal(result.delta, expected)
    (warning,) = warnings(caplog)
    assert "principal spaces are not kept" in warning and str(cache) in warning
    assert len(fits) == 4


def test_a_folder_that_may_not_be_looked_into(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert projected().shape == DELTA.shape
    assert len(warnings(caplog)) == 1


def test_small_weights_and_current_bases_make_no_files(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fits: list[int]
) -> None:
    projected(config=SphereConfig(eta=0.4, alpha=0.0, basis="pretrained"))
    assert not fits
    SphereConfig().bind(WEIGHT)(WEIGHT, DELTA)
    monkeypatch.setattr(spaces, "SMALLEST", 25)
    projected()
    assert len(fits) == 2 and not cache.exists()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(24, 60), "zeros only"),
        (WEIGHT.clone().fill_(float("nan")), "NaN or infinite"),
        (WEIGHT.to("meta"), "meta"),
        (WEIGHT.int(), "dtype"),
        (WEIGHT[0], "two dimensions"),
    ],
    ids=["zeros", "NaN", "meta", "integers", "a vector"],
)
def test_what_a_fit_refuses_is_refused(weight: Tensor, message: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=message):
        Spaces().space_of(weight, 0.4, True)
    assert not cache.exists()


def test_a_config_is_what_it_was_after_it_has_been_bound(cache: Path) -> None:
    config = SphereConfig(eta=0.4, alpha=0.7, basis="pretrained")
    projected(config=config)
    assert config == CONFIG and hash(config) == hash(CONFIG) and repr(config) == repr(CONFIG)
    assert "_spaces" not in repr(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_editors_of_one_model_decompose_it_once(kind: str, make_editor, cache: Path, fits: list[int]) -> None:
    weights = []
    for _ in range(2):
        editor = make_editor(kind, base_method="MEMIT", basis="pretrained", alpha=0.8)
        editor.apply(REQUESTS)
        weights.append([rewrite.weight.clone() for rewrite in editor.anatomy.rewrites.values()])
    assert len(fits) == len(editor.config.layers) == len(list(cache.iterdir()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
