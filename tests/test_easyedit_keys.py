"""The keys `sphere`, `rect` and `prune` in the YAMLs of EasyEdit's own methods, on the host that is found."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosted import HPARAMS, WORDS, clean_host, settings

import sphere_plugin as sp
from sphere_plugin import ConfigError, HostError
from sphere_plugin.easyedit.host import Host, find_host
from sphere_plugin.easyedit.keys import Asked, asked_of
from sphere_plugin.restraints import PruneConfig, RectConfig, SphereConfig

try:
    HOST = find_host()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

only_on_main = pytest.mark.skipif(HOST.kind != "main", reason="EASYEDIT_HOME is not set: no YAMLs of EasyEdit")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    yield from clean_host(monkeypatch, tmp_path)


def classes() -> list[type]:
    """EasyEdit's classes of hyper-parameters that are read from files."""
    found, waiting = [], [sys.modules["easyeditor.util.hparams"].HyperParams]
    while waiting:
        kind = waiting.pop(0)
        waiting += kind.__subclasses__()
        found += [kind] if hasattr(kind, "from_hparams") and kind.__module__.startswith("easyeditor.") else []
    return found


def quietly(load: Callable[..., Any], *args: object) -> Any:
    """Load; None if EasyEdit itself cannot. Its loaders print, and fail in many ways."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return load(*args)
        except Exception:
            return None


# ---- every class takes the keys ----


@only_on_main
def test_every_yaml_of_easyedit_loads_with_the_key_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every YAML with every class that loads it; those of steering are read by other means."""
    monkeypatch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    theirs, ours = HOST.location.parent / "hparams", tmp_path / "hparams"
    shutil.copytree(theirs, ours, ignore=shutil.ignore_patterns("Steer"))
    names = [path.relative_to(ours) for path in sorted(ours.rglob("*.yaml"))]
    plain = {
        (kind, name): loaded
        for kind in classes()
        for name in names
        if (loaded := quietly(kind.from_hparams, str(theirs / name))) is not None
    }
    assert len(plain) >= 250 and len({kind for kind, _ in plain}) >= 35
    for name in names:
        (ours / name).write_text((ours / name).read_text(encoding="utf-8") + "\nsphere: true\n", encoding="utf-8")
    assert {type(quietly(kind.from_hparams, str(ours / name))) for kind, name in plain} == {type(None)}
    sp.register()
    for (kind, name), before in plain.items():
        loaded = quietly(kind.from_hparams, str(ours / name))
        assert loaded is not None and loaded.sphere is True, f"{kind.__name__} of {name}"
        # A SimIE holds the hyper-parameters of its base method, whose YAML has the key as well.
        extra = {"sphere"} | ({"_base_hparams"} if hasattr(before, "_base_hparams") else set())
        assert set(vars(loaded)) == set(vars(before)) | {"sphere"}
        assert {key: value for key, value in vars(loaded).items() if key not in extra} == {
            key: value for key, value in vars(before).items() if key not in extra
        }
        assert dataclasses.asdict(loaded) == dataclasses.asdict(before)


def values(kind: type) -> dict[str, object]:
    return {field.name: f"the {field.name}" for field in dataclasses.fields(kind) if field.init}


def test_every_class_of_easyedit_takes_the_keys() -> None:
    plain = {kind: kind(**values(kind)) for kind in classes()}
    assert len(plain) >= 15
    sp.register()
    for kind, before in plain.items():
        loaded = kind(**values(kind), sphere={"eta": 0.4}, rect=True, prune={"base": 2})
        assert loaded == before and dataclasses.asdict(loaded) == dataclasses.asdict(before)
        assert vars(loaded) == {**vars(before), "sphere": {"eta": 0.4}, "rect": True, "prune": {"base": 2}}
        assert vars(kind(**values(kind))) == vars(before)


# ---- what a YAML may say ----


def written(folder: Path, method: str = "FT", **keys: object) -> str:
    """A YAML of EasyEdit's for ``method``, with ``keys``."""
    kind = getattr(sys.modules["easyeditor"], HPARAMS[method])
    pool = settings(method, "llama", folder)
    known = {field.name: pool.get(field.name) for field in dataclasses.fields(kind)}
    path = folder / f"{WORDS['llama']}.yaml"
    path.write_text(yaml.safe_dump({**known, **keys}))
    return str(path)


def read(folder: Path, method: str = "FT", **keys: object) -> Any:
    return getattr(sys.modules["easyeditor"], HPARAMS[method]).from_hparams(written(folder, method, **keys))


ASKED = [
    ({}, None),
    ({"sphere": False}, None),
    ({"sphere": False, "rect": False, "prune": False}, None),
    ({"sphere": True}, Asked(sphere=SphereConfig(alpha=0.8))),
    ({"sphere": {}}, Asked(sphere=SphereConfig(alpha=0.8))),
    (
        {"sphere": {"eta": 0.3, "alpha": 0.2, "basis": "pretrained", "row_normalize": False}},
        Asked(sphere=SphereConfig(0.3, 0.2, "pretrained", False)),
    ),
    ({"sphere": {"cumulative_ratio": 0.3, "suppression_strength": 0.2}}, Asked(sphere=SphereConfig(0.3, 0.2))),
    ({"sphere": {"alpha": "2e-1"}}, Asked(sphere=SphereConfig(alpha=0.2))),  # YAML reads 2e-1 as text
    ({"rect": True}, Asked(rect=RectConfig())),
    ({"rect": {"keep": 0.1}, "sphere": False}, Asked(rect=RectConfig(0.1))),
    ({"prune": {"base": 2}, "sphere": True}, Asked(prune=PruneConfig(2), sphere=SphereConfig(alpha=0.8))),
]


@pytest.mark.parametrize(("keys", "expected"), ASKED, ids=lambda value: str(value)[:60])
def test_what_the_keys_ask_for(keys: dict, expected: Asked | None, tmp_path: Path) -> None:
    sp.register()
    hparams = read(tmp_path, **keys)
    assert asked_of(hparams) == expected
    assert {key: getattr(hparams, key) for key in keys} == keys


WRONG = [
    ({"sphere": 3}, "sphere: got 3"),
    ({"sphere": None}, "sphere: got None"),
    ({"sphere": "true"}, "sphere: got 'true'"),
    ({"sphere": {"alpha": 2}}, r"sphere\.alpha: got 2"),
    ({"sphere": {"eta": 0}}, r"sphere\.eta: got 0"),
    ({"sphere": {"basis": "now"}}, r"sphere\.basis: got 'now'"),
    ({"sphere": {"alfa": 1}}, "sphere: got 'alfa'.*'alpha'"),
    ({"rect": {"keep": 0}}, r"rect\.keep: got 0"),
    ({"prune": {"base": 1}}, r"prune\.base: got 1"),
    ({"spheer": True}, "hparams: got 'spheer', expected a key of FTHyperParams. The nearest one is 'sphere'"),
    ({"num_stepps": 3}, "hparams: got 'num_stepps', expected a key of FTHyperParams. The nearest one is 'num_steps'"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_means_nothing_is_told_as_it_is_read(keys: dict, message: str, tmp_path: Path) -> None:
    sp.register()
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **keys)


@pytest.mark.parametrize(
    ("method", "alpha"),
    [("ROME", 0.8), ("MEMIT", 0.8), ("MEND", 0.8), pytest.param("AlphaEdit", 0.5, marks=only_on_main)],
)
def test_the_strength_is_the_papers_unless_given(method: str, alpha: float, tmp_path: Path) -> None:
    sp.register()
    assert asked_of(read(tmp_path, method, sphere=True)).sphere.alpha == alpha
    assert asked_of(read(tmp_path, method, sphere={"eta": 0.4})).sphere == SphereConfig(0.4, alpha)
    assert asked_of(read(tmp_path, method, sphere={"alpha": 0.1})).sphere.alpha == 0.1


def test_a_key_may_be_set_after_loading(host: Host, tmp_path: Path) -> None:
    sp.register()
    hparams = read(tmp_path)
    assert asked_of(hparams) is None
    hparams.sphere = True
    assert asked_of(hparams) == Asked(sphere=SphereConfig(alpha=0.8))
    hparams.sphere = {"alpha": -1}
    with pytest.raises(ConfigError, match=r"sphere\.alpha: got -1"):
        host.base_editor.from_hparams(hparams)


@only_on_main
def test_simie_hands_its_keys_on_and_its_base_method_may_have_its_own(host: Host, tmp_path: Path) -> None:
    for name in ("SimIE", "ROME"):
        (tmp_path / name).mkdir()
    base = written(tmp_path / "ROME", "ROME", rect=True)
    sp.register()
    path = written(tmp_path / "SimIE", "SimIE", sphere={"alpha": 0.3})
    text = yaml.safe_load(Path(path).read_text())
    del text["_base_hparams"]
    Path(path).write_text(yaml.safe_dump(text))
    hparams = sys.modules["easyeditor"].SimIEHyperParams.from_hparams(path)
    assert Path(base).exists() and asked_of(hparams.base_hparams) == Asked(rect=RectConfig())
    assert asked_of(hparams) == Asked(rect=RectConfig(), sphere=SphereConfig(alpha=0.3))
    assert asked_of(hparams.base_hparams) == Asked(rect=RectConfig())  # nothing is written into them
    hparams.sphere = False
    assert asked_of(hparams) == Asked(rect=RectConfig())


# ---- classes that come later ----


def test_classes_that_are_defined_later_take_the_keys_too(host: Host, tmp_path: Path) -> None:
    sp.register()
    base: Any = sys.modules["easyeditor.util.hparams"].HyperParams

    @dataclasses.dataclass
    class Mine(base):
        alg_name: str
        layers: list[int]

        @classmethod
        def from_hparams(cls, path: str) -> Any:
            return cls(**yaml.safe_load(Path(path).read_text()))

    @dataclasses.dataclass
    class Heir(Mine):
        more: int = 3

    loader = vars(Mine)["from_hparams"]
    path = tmp_path / "mine.yaml"
    for kind in (Heir, Mine):
        path.write_text(yaml.safe_dump({"alg_name": "FT", "layers": [1], "sphere": {"alpha": 0.25}}))
        loaded = kind.from_hparams(str(path))
        assert type(loaded) is kind and loaded.layers == [1]
        assert asked_of(loaded) == Asked(sphere=SphereConfig(alpha=0.25))
        path.write_text(yaml.safe_dump({"alg_name": "FT", "layers": [1], "spheer": True}))
        with pytest.raises(ConfigError, match=f"expected a key of {kind.__name__}. The nearest one is 'sphere'"):
            kind.from_hparams(str(path))
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"alg_name": "FT", "layers": [1], "rect": True}))
    assert asked_of(Mine.from_json(path)) == Asked(rect=RectConfig())
    sp.unregister()
    assert vars(Mine)["from_hparams"] is not loader  # again the one that was written
    path.write_text(json.dumps({"alg_name": "FT", "layers": [1], "sphere": True}))
    for kind in (Heir, Mine):
        with pytest.raises(TypeError, match="unexpected keyword argument 'sphere'"):
            kind.from_hparams(str(path))
        assert kind("FT", [2]).layers == [2]


def test_a_field_of_the_class_itself_is_left_to_it() -> None:
    sp.register()
    base: Any = sys.modules["easyeditor.util.hparams"].HyperParams

    @dataclasses.dataclass
    class Round(base):
        rect: bool = False
        alg_name: str = "FT"

        @classmethod
        def from_hparams(cls, **keys: object) -> Any:
            return cls(**keys)

    loaded = Round.from_hparams(rect=True, sphere=True)
    assert dataclasses.asdict(loaded) == {"rect": True, "alg_name": "FT"} and loaded.sphere is True


# ---- overrides ----


def test_overrides_win_over_the_yaml(tmp_path: Path) -> None:
    sp.register(overrides={"sphere": {"alpha": 0.9}, "rect": False})
    for keys in ({}, {"sphere": False, "rect": True}, {"sphere": True}, {"sphere": {"suppression_strength": 0.1}}):
        assert asked_of(read(tmp_path, **keys)) == Asked(sphere=SphereConfig(alpha=0.9))
    block = {"alpha": 0.1, "eta": 0.2, "basis": "pretrained"}  # what the override does not name stays
    kept = SphereConfig(eta=0.2, alpha=0.9, basis="pretrained")
    assert asked_of(read(tmp_path, sphere=block)) == Asked(sphere=kept)
    sp.register(overrides={"sphere": True})
    assert asked_of(read(tmp_path, sphere={"alpha": 0.1})) == Asked(sphere=SphereConfig(alpha=0.1))
    assert asked_of(read(tmp_path, sphere=False)) == Asked(sphere=SphereConfig(alpha=0.8))
    sp.register(overrides={"prune": True})  # other overrides take the place of those
    assert asked_of(read(tmp_path)) == Asked(prune=PruneConfig())
    sp.register()  # none given: those stay
    assert asked_of(read(tmp_path)) == Asked(prune=PruneConfig())
    sp.register(overrides={})
    assert asked_of(read(tmp_path)) is None


def test_an_override_that_means_nothing_is_told_at_the_first_yaml(tmp_path: Path) -> None:
    sp.register(overrides={"sphere": {"alpha": 7}})
    with pytest.raises(ConfigError, match=r"sphere\.alpha: got 7"):
        read(tmp_path)


@only_on_main
def test_overrides_reach_easyedits_own_sphere(host: Host) -> None:
    path = str(HOST.location.parent / "hparams" / "SPHERE" / "llama3-8b.yaml")
    own = sys.modules["easyeditor"].SPHEREHyperParams
    plain = own.from_hparams(path)
    sp.register(overrides={"sphere": {"alpha": 0.9}})
    loaded = own.from_hparams(path)
    assert (loaded.suppression_strength, loaded.cumulative_ratio) == (0.9, plain.cumulative_ratio)
    ours = sp.SphereHyperParams.of(loaded)
    assert (ours.alpha, ours.eta) == (0.9, plain.cumulative_ratio)


# ---- and nothing of it stays ----


def test_unregistered_the_keys_are_unknown_again(tmp_path: Path) -> None:
    before = {kind: dict(vars(kind)) for kind in classes()}
    sp.register()
    assert read(tmp_path, sphere=True).sphere is True
    sp.unregister()
    after = {kind: dict(vars(kind)) for kind in classes()}
    assert [kind for kind in before if before[kind].keys() != after[kind].keys()] == []
    assert [kind for kind, own in before.items() if any(own[name] is not after[kind][name] for name in own)] == []
    with pytest.raises(TypeError, match="unexpected keyword argument 'sphere'"):
        read(tmp_path, sphere=True)
