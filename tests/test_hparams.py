"""Hyper-parameters: the YAMLs of this project and of EasyEdit, what is refused, and docs/hparams.md."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from sphere_plugin.easyedit.blocks import SYNONYMS, nearest, read_prune, read_rect, read_sphere
from sphere_plugin.easyedit.hparams import (
    CLASSES,
    UNUSED,
    PruneHyperParams,
    RectHyperParams,
    SphereHyperParams,
)
from sphere_plugin.editing import EditingConfig
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.errors import ConfigError
from sphere_plugin.restraints import Chain, PruneConfig, RectConfig, SphereConfig

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "hparams" / "SPHERE"
DOCS = ROOT / "docs" / "hparams.md"
HOME = os.environ.get("EASYEDIT_HOME", "")

needs_main = pytest.mark.skipif(not HOME, reason="EASYEDIT_HOME is not set: no YAMLs of EasyEdit to read")

# Of the real models: layers, and what is rewritten in each.
DEPTH = {"smollm2-135m": 30, "llama3-8b": 32, "qwen2.5-7b": 28, "gpt-j-6B": 28, "gpt2-xl": 48}
LLAMA_LIKE = "model.layers.{}.mlp.down_proj.weight"
REWRITTEN = {
    "smollm2-135m": LLAMA_LIKE,
    "llama3-8b": LLAMA_LIKE,
    "qwen2.5-7b": LLAMA_LIKE,
    "gpt-j-6B": "transformer.h.{}.mlp.fc_out.weight",
    "gpt2-xl": "transformer.h.{}.mlp.c_proj.weight",
}
EASYEDIT = ("gpt-j-6B", "gpt2-xl", "llama3-8b", "llama3.1-8b", "qwen2.5-7b")

# The least a YAML can say.
LEAST = {
    "model_name": "smollm2-135m",
    "layers": [1, 2],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}


def made(**changes: object) -> SphereHyperParams:
    return SphereHyperParams.from_mapping({**LEAST, **changes})


def refused(**changes: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        made(**changes)
    return caught.value


def tiny(name: str, layers: int) -> PreTrainedModel:
    """A model of the architecture that hparams/SPHERE/<name>.yaml is for, 32 wide."""
    gated = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    gated |= {"num_hidden_layers": layers, "num_key_value_heads": 2}
    gpt = {"vocab_size": 64, "n_embd": 32, "n_inner": 64, "n_head": 4, "n_layer": layers, "n_positions": 16}
    configs = {
        "smollm2-135m": lambda: LlamaConfig(**gated, tie_word_embeddings=True),
        "llama3-8b": lambda: LlamaConfig(**gated),
        "qwen2.5-7b": lambda: Qwen2Config(**gated),
        "gpt-j-6B": lambda: GPTJConfig(**gpt, rotary_dim=4, tie_word_embeddings=False),
        "gpt2-xl": lambda: GPT2Config(**gpt),
    }
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32)


# ---- the YAMLs of this project ----


def test_there_is_one_yaml_for_each_of_the_five_models():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in DEPTH}


@pytest.mark.parametrize("name", DEPTH)
class TestShipped:
    def test_it_loads_with_what_it_says(self, name):
        written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        loaded = vars(SphereHyperParams.from_hparams(FOLDER / name))
        assert {key: loaded[key] for key in written} == written

    def test_plain_yaml_reads_its_numbers_as_numbers(self, name):
        written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        fractions = [field.name for field in dataclasses.fields(SphereHyperParams) if "float" in str(field.type)]
        values = {key: written[key] for key in fractions}  # none of them is left out
        assert len(values) == 9
        assert {key: value for key, value in values.items() if type(value) not in (int, float)} == {}

    def test_no_key_in_it_is_idle_or_another_name(self, name):
        written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert written.keys().isdisjoint({*UNUSED, *SYNONYMS, "sphere"})

    def test_it_asks_for_the_papers_sphere(self, name):
        hparams = SphereHyperParams.from_hparams(FOLDER / name)
        assert hparams.sphere() == SphereConfig(eta=0.5, alpha=0.5, basis="current", row_normalize=True)
        assert (hparams.alg_name, hparams.base_method, hparams.projection) == ("SPHERE", "AlphaEdit", "in_loop")

    def test_its_names_fit_a_model_of_that_architecture(self, name):
        hparams = SphereHyperParams.from_hparams(FOLDER / name)
        model = tiny(name, DEPTH[name])
        anatomy = Anatomy.of(model, hparams.editing())
        assert [rewrite.name for rewrite in anatomy.rewrites.values()] == [
            REWRITTEN[name].format(layer) for layer in hparams.layers
        ]
        assert {tuple(rewrite.weight.shape) for rewrite in anatomy.rewrites.values()} == {(32, 64)}
        assert {rewrite.transposed for rewrite in anatomy.rewrites.values()} == {name == "gpt2-xl"}
        assert len(anatomy.decoder) == DEPTH[name]
        assert anatomy.head is model.get_output_embeddings()
        assert anatomy.norm is getattr(model.base_model, "ln_f" if name.startswith("gpt") else "norm")

    def test_its_loss_is_read_from_the_last_layer(self, name):
        hparams = SphereHyperParams.from_hparams(FOLDER / name)
        assert hparams.v_loss_layer == DEPTH[name] - 1

    def test_it_does_not_fit_a_model_with_fewer_layers(self, name):
        hparams = SphereHyperParams.from_hparams(FOLDER / name)
        with pytest.raises(ConfigError, match="v_loss_layer"):
            Anatomy.of(tiny(name, DEPTH[name] - 1), hparams.editing())


PAPER = {  # layers, steps, v_lr: appendix D.4; the others: the authors' JSON
    "llama3-8b": ([4, 5, 6, 7, 8], 25, 0.1, 0.5, 0.75, 15000),
    "qwen2.5-7b": ([4, 5, 6, 7, 8], 25, 0.5, 0.001, 4, 15000),
    "gpt-j-6B": ([3, 4, 5, 6, 7, 8], 25, 0.5, 0.5, 0.75, 15000),
    "gpt2-xl": ([13, 14, 15, 16, 17], 20, 0.5, 0.5, 0.75, 20000),
}


@pytest.mark.parametrize("name", PAPER)
def test_values_of_the_papers(name):
    hparams = SphereHyperParams.from_hparams(FOLDER / name)
    assert (
        hparams.layers,
        hparams.v_num_grad_steps,
        hparams.v_lr,
        hparams.v_weight_decay,
        hparams.clamp_norm_factor,
        hparams.mom2_update_weight,
    ) == PAPER[name]
    assert (hparams.kl_factor, hparams.nullspace_threshold, hparams.L2) == (0.0625, 0.02, 10)
    assert (hparams.mom2_dataset, hparams.mom2_n_samples) == ("wikipedia", 100000)
    assert (hparams.context_template_length_params, hparams.fact_token) == ([[10, 5]], "subject_last")
    assert (hparams.device, hparams.batch_size) == (0, 1)


# ---- the YAMLs of EasyEdit ----


def test_no_path_at_all_is_refused():
    with pytest.raises(ConfigError, match="hparams: got '.', expected a file that can be read"):
        SphereHyperParams.from_hparams("")


@needs_main
@pytest.mark.parametrize("name", EASYEDIT)
class TestEasyEdit:
    def test_its_own_yaml_loads_unchanged(self, name):
        path = Path(HOME).expanduser() / "hparams" / "SPHERE" / f"{name}.yaml"
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        hparams = SphereHyperParams.from_hparams(str(path))
        assert (hparams.eta, hparams.alpha) == (written["cumulative_ratio"], written["suppression_strength"])
        numbers = ("v_lr", "v_weight_decay", "nullspace_threshold", "L2", "clamp_norm_factor", "mom2_update_weight")
        assert {key: getattr(hparams, key) for key in numbers} == {key: float(written[key]) for key in numbers}
        same = ("model_name", "layers", "v_loss_layer", "rewrite_module_tmp", "mom2_dataset", "stats_dir")
        assert {key: getattr(hparams, key) for key in same} == {key: written[key] for key in same}
        assert hparams.base_method == "AlphaEdit"

    def test_its_names_for_eta_and_alpha_are_read(self, name, tmp_path):
        path = Path(HOME).expanduser() / "hparams" / "SPHERE" / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        text, etas = re.subn(r"(?m)^cumulative_ratio:.*", "cumulative_ratio: 0.25", text)
        text, alphas = re.subn(r"(?m)^suppression_strength:.*", "suppression_strength: 0.75", text)
        assert (etas, alphas) == (1, 1)
        (tmp_path / "other.yaml").write_text(text, encoding="utf-8")
        hparams = SphereHyperParams.from_hparams(tmp_path / "other")
        assert (hparams.eta, hparams.alpha) == (0.25, 0.75)


@needs_main
def test_these_are_all_yamls_that_easyedit_has_for_sphere():
    folder = Path(HOME).expanduser() / "hparams" / "SPHERE"
    assert {path.stem for path in folder.glob("*.yaml")} == set(EASYEDIT)


@pytest.mark.parametrize("key", UNUSED)
def test_a_key_that_is_not_needed_changes_nothing(key):
    assert made(**{key: "all" if key == "layer_selection" else "anything"}) == made()


# ---- files ----


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        path = tmp_path / "small-1.5b.yaml"
        path.write_text(yaml.safe_dump(LEAST), encoding="utf-8")
        return path

    def test_the_suffix_may_be_left_out(self, file):
        whole = SphereHyperParams.from_hparams(str(file))
        assert whole == SphereHyperParams.from_hparams(str(file).removesuffix(".yaml")) == made()

    def test_yml_is_a_suffix_too(self, file):
        other = file.rename(file.with_suffix(".yml"))
        assert SphereHyperParams.from_hparams(other) == made()

    def test_the_home_folder_is_found(self, file, monkeypatch):
        monkeypatch.setenv("HOME", str(file.parent))
        assert SphereHyperParams.from_hparams(f"~/{file.name}") == made()

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            pytest.param("- layers\n- eta\n", "a YAML mapping", id="list"),
            pytest.param("", "a YAML mapping", id="empty"),
            pytest.param("just words", "a YAML mapping", id="text"),
            pytest.param("layers: [4, 5\neta: 0.5\n", "valid YAML", id="open-bracket"),
            pytest.param("eta: 0.5\n\talpha: 1\n", "valid YAML", id="tab"),
        ],
    )
    def test_a_file_that_is_no_mapping_is_named(self, text, expected, file):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=re.escape(str(file))) as caught:
            SphereHyperParams.from_hparams(file)
        assert caught.value.expected.startswith(expected)

    @pytest.mark.parametrize("kind", ["missing", "folder"])
    def test_a_file_that_cannot_be_read_is_named(self, kind, tmp_path):
        path = tmp_path / "none.yaml"
        if kind == "folder":
            path.mkdir()
        with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
            SphereHyperParams.from_hparams(tmp_path / "none")
        assert "can be read" in caught.value.expected
        assert "hparams/SPHERE" in caught.value.remedy

    def test_an_exponent_without_a_dot_is_a_number_all_the_same(self, file):
        more = "nullspace_threshold: 2e-2\nv_weight_decay: 1e-3\nL2: 1e1\nalpha: 5e-1\ncumulative_ratio: 25e-2\n"
        file.write_text(yaml.safe_dump(LEAST) + more, encoding="utf-8")
        assert yaml.safe_load(file.read_text())["nullspace_threshold"] == "2e-2"  # what this test is about
        hparams = SphereHyperParams.from_hparams(file)
        read = (hparams.nullspace_threshold, hparams.v_weight_decay, hparams.L2, hparams.alpha, hparams.eta)
        assert read == (0.02, 0.001, 10.0, 0.5, 0.25)
        assert {type(number) for number in read} == {float}


# ---- keys ----


@pytest.mark.parametrize(
    ("key", "near"),
    [("layer", "layers"), ("v_lrr", "v_lr"), ("mom2_update_wieght", "mom2_update_weight"), ("Alpha", "alpha"),
     ("nullspace_treshold", "nullspace_threshold"), ("row_normalise", "row_normalize")],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_one(key, near):
    error = refused(**{key: 1})
    assert f"got {key!r}" in str(error)
    assert repr(near) in error.remedy and "docs/hparams.md" in error.remedy


def test_an_unknown_key_that_is_a_number_is_refused():
    with pytest.raises(ConfigError, match="got 7, expected a known key"):
        SphereHyperParams.from_mapping({**LEAST, 7: 1})


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        SphereHyperParams.from_mapping({"alg_name": "SPHERE", "eta": 0.5})
    assert sorted(caught.value.got) == sorted(LEAST)


@pytest.mark.parametrize("key", LEAST)
def test_each_required_key_is_missed(key):
    content = {name: value for name, value in LEAST.items() if name != key}
    with pytest.raises(ConfigError) as caught:
        SphereHyperParams.from_mapping(content)
    assert caught.value.got == [key]


@pytest.mark.parametrize("name", ["AlphaEdit", "MEMIT", "sphere", "", None])
def test_another_method_is_refused(name):
    error = refused(alg_name=name)
    assert str(error).startswith(f"alg_name: got {name!r}, expected SPHERE")


def test_reading_leaves_the_mapping_alone():
    content = {**LEAST, "P_loc": "x", "sphere": {"eta": 0.3}, "suppression_strength": "4e-1"}
    before = copy.deepcopy(content)
    SphereHyperParams.from_mapping(content)
    assert content == before


# ---- values ----

NAN, INF = math.nan, math.inf
NO_NUMBER = ["much", "inf", None, True, [0.1], NAN, INF]
NO_COUNT = [0, -1, 2.0, "5", None, True, NAN]
BAD: dict[str, list[Any]] = {
    "model_name": ["", None, 3],
    "alg_name": ["AlphaEdit", None],
    "batch_size": NO_COUNT,
    "layers": [[], [4, 4], [5, 4], [-1], [1.0], ["4"], [True], 4, "4-8", None],
    "rewrite_module_tmp": ["model.layers.4.mlp.down_proj", "{}.{}", "model.layers.{}", "h.{}.mlp", "", None, 3],
    "layer_module_tmp": ["model.layers.4", "model.{}.{}", "", None, 3],
    "base_method": ["alphaedit", "ROME", "", None, 3, ["MEMIT"]],
    "fact_token": ["subject", "Last", None, 1],
    "projection": ["inloop", "Post", None, True],
    "control": ["smaller", "Random", True, 1],  # None is allowed
    "basis": ["original", "Current", None, True],
    "eta": [0, -0.5, 1.01, -INF, *NO_NUMBER],
    "alpha": [-0.01, 1.01, -INF, INF, "much", True, [0.1], NAN],  # None is allowed
    "v_num_grad_steps": NO_COUNT,
    "mom2_n_samples": [*NO_COUNT, "1e5"],
    "aiming_dtype": ["float16", "bf16", torch.bfloat16, None, True],
    "token_budget": [63, 0, -64, 128.0, "128", None, True],
    "seed": [-1, 1.0, "1", None, True, NAN],
    "v_loss_layer": [-1, 31.0, "31", True, NAN],  # None is allowed
    "v_lr": [0, -0.1, -INF, *NO_NUMBER],
    "clamp_norm_factor": [0, -0.1, *NO_NUMBER],
    "mom2_update_weight": [0, -1, *NO_NUMBER],
    "nullspace_threshold": [0, -0.02, *NO_NUMBER],
    "L2": [0, -1, *NO_NUMBER],
    "v_weight_decay": [-0.1, *NO_NUMBER],
    "kl_factor": [-0.1, *NO_NUMBER],
    "context_template_length_params": [
        [10, 5],
        [[10]],
        [[10, 0]],
        [[-1, 5]],
        [["10", 5]],
        [[1.5, 2]],
        "10",
        5,
        None,
        [[True, 5]],
    ],
    "ln_f_module": ["", " ", None, 3],
    "lm_head_module": ["", None, 3],
    "mom2_dataset": ["", None, 5],
    "stats_dir": ["", 3],  # None is allowed
    "row_normalize": ["false", 0, None],
    "rect": ["yes", 0, 0.4, [0.4], SphereConfig()],  # None is allowed
    "prune": ["yes", 1, math.e, [2], RectConfig()],  # None is allowed
    "fp16": ["no", 1, None],
    "bf16": ["no", 1, None],
    "master_copy": ["no", 1, None],
    "stats_device": ["", "mps", "gpu", "cuda:x", 0, True],  # None is allowed
    "model_parallel": ["x", 1, None],
    "max_length": NO_COUNT,
    "device": ["", None, True, 1.5, -1, "mps"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(field, value):
    error = refused(**{field: value})
    assert str(error).startswith(f"{field}: got {value!r}, expected ")
    assert error.remedy.endswith((".", '"'))


def test_every_field_has_its_bad_values_here():
    assert set(BAD) == {field.name for field in dataclasses.fields(SphereHyperParams)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eta", 1), ("alpha", 0), ("alpha", 1), ("kl_factor", 0), ("v_weight_decay", 0), ("L2", 1), ("layers", [0]),
        ("batch_size", 100), ("v_num_grad_steps", 1), ("mom2_n_samples", 1), ("token_budget", 64),
        ("base_method", "MEMIT"), ("seed", 0), ("v_loss_layer", None), ("v_loss_layer", 2),
        ("context_template_length_params", []), ("context_template_length_params", [[10, 5], [5, 1]]),
        ("projection", "post"), ("basis", "pretrained"), ("row_normalize", False), ("fact_token", "last"),
        ("fact_token", "subject_first"), ("fact_token", "subject_first_after_last"), ("device", "cuda:1"),
    ],
)  # fmt: skip
def test_values_at_the_edge_are_taken(field, value):
    hparams = made(**{field: value})
    assert getattr(hparams, field) == getattr(hparams.editing(), field, value) == value


# ---- eta, alpha and the sphere block ----


@pytest.mark.parametrize(("base_method", "alpha"), [("AlphaEdit", 0.5), ("MEMIT", 0.8)])
def test_alpha_follows_the_base_method_unless_given(base_method, alpha):
    assert made(base_method=base_method).alpha == alpha
    assert made(base_method=base_method, alpha=None).sphere().alpha == alpha
    assert made(base_method=base_method, alpha=0.3).sphere().alpha == 0.3
    assert made(base_method=base_method, alpha=0.0).sphere().alpha == 0.0


def test_sphere_true_adds_nothing():
    assert made(sphere=True) == made()


def test_a_sphere_block_is_lifted():
    block = {"eta": 0.3, "alpha": "7e-1", "basis": "pretrained"}
    assert made(sphere=block).sphere() == SphereConfig(eta=0.3, alpha=0.7, basis="pretrained")
    assert made(sphere=block) == made(eta=0.3, alpha=0.7, basis="pretrained")


def test_easyedits_names_are_read_inside_a_block_too():
    hparams = made(sphere={"cumulative_ratio": 0.3, "suppression_strength": 0.7})
    assert (hparams.eta, hparams.alpha) == (0.3, 0.7)


@pytest.mark.parametrize("block", [False, "yes", 3, [0.5, 0.8]])
def test_anything_else_as_a_block_is_refused(block):
    assert str(refused(sphere=block)).startswith(f"sphere: got {block!r}, expected true")


def test_an_unknown_key_in_a_block_is_refused():
    error = refused(sphere={"alhpa": 0.5})
    assert "got 'alhpa'" in str(error) and "'alpha'" in error.remedy


@pytest.mark.parametrize(
    ("key", "content"),
    [
        pytest.param("eta", {"eta": 0.5, "cumulative_ratio": 0.4}, id="eta-and-its-synonym"),
        pytest.param("alpha", {"alpha": 0.5, "suppression_strength": 0.4}, id="alpha-and-its-synonym"),
        pytest.param("eta", {"eta": 0.5, "sphere": {"eta": 0.4}}, id="top-and-block"),
        pytest.param("basis", {"basis": "current", "sphere": {"basis": "pretrained"}}, id="basis-top-and-block"),
        pytest.param("alpha", {"suppression_strength": 0.5, "sphere": {"alpha": 0.4}}, id="synonym-and-block"),
        pytest.param("alpha", {"alpha": 0.5, "cumulative_ratio": 0}, id="switched-off-and-alpha"),
    ],
)
def test_two_different_values_for_one_thing_are_refused(key, content):
    error = refused(**content)
    assert error.culprit == key
    assert len(set(error.got)) == 2 and "one value" in error.expected


def test_the_same_value_twice_is_taken():
    hparams = made(eta=0.4, cumulative_ratio=0.4, alpha=0.6, suppression_strength=0.6, sphere={"eta": 0.4})
    assert (hparams.eta, hparams.alpha) == (0.4, 0.6)


@pytest.mark.parametrize("zero", [0, 0.0, "0e0"])
def test_cumulative_ratio_zero_switches_the_projection_off(zero):
    hparams = made(cumulative_ratio=zero, suppression_strength=0.5)
    assert (hparams.eta, hparams.alpha) == (0.5, 0.0)


def test_suppression_strength_zero_switches_the_projection_off():
    assert made(cumulative_ratio=0.3, suppression_strength=0).sphere() == SphereConfig(eta=0.3, alpha=0.0)


@pytest.mark.parametrize("name", SYNONYMS)
def test_a_bad_value_under_easyedits_name_is_refused(name):
    error = refused(**{name: 1.5})
    assert str(error).startswith(f"{SYNONYMS[name]}: got 1.5")


@given(
    eta=st.floats(0.0, 1.0, exclude_min=True),
    alpha=st.floats(0.0, 1.0),
    names=st.sampled_from([("eta", "alpha"), ("cumulative_ratio", "suppression_strength")]),
    block=st.booleans(),
)
def test_every_eta_and_alpha_in_range_comes_back(eta, alpha, names, block):
    numbers = dict(zip(names, (eta, alpha), strict=True))
    written = yaml.safe_dump({**LEAST, **({"sphere": numbers} if block else numbers)})
    hparams = SphereHyperParams.from_mapping(yaml.safe_load(written))
    assert (hparams.eta, hparams.alpha) == (eta, alpha)
    assert hparams.sphere() == hparams.editing().sphere() == SphereConfig(eta=eta, alpha=alpha)


# ---- the blocks ----


READERS = {
    "sphere": lambda value: read_sphere(value, 0.7),
    "rect": read_rect,
    "prune": read_prune,
}
DEFAULTS = {"sphere": SphereConfig(alpha=0.7), "rect": RectConfig(keep=0.4), "prune": PruneConfig(base=math.e)}


@pytest.mark.parametrize("name", READERS)
class TestBlocks:
    def test_true_an_empty_block_and_a_configuration_are_read(self, name):
        assert READERS[name](True) == READERS[name]({}) == DEFAULTS[name]
        config = {"sphere": SphereConfig(0.2, 0.3, "pretrained"), "rect": RectConfig(0.1), "prune": PruneConfig(3)}
        assert READERS[name](config[name]) == config[name]

    def test_false_is_none(self, name):
        assert READERS[name](False) is None

    @pytest.mark.parametrize("value", [None, 0, 1, 0.4, "true", "", [], [0.4], math.nan])
    def test_anything_else_is_refused(self, name, value):
        with pytest.raises(ConfigError) as caught:
            READERS[name](value)
        assert str(caught.value).startswith(f"{name}: got {value!r}, expected true, false, or a block of ")

    def test_a_configuration_of_another_restraint_is_refused(self, name):
        for other in DEFAULTS.keys() - {name}:
            with pytest.raises(ConfigError, match=f"{name}: got "):
                READERS[name](DEFAULTS[other])

    @pytest.mark.parametrize("key", ["zeta", 3, None, ""])
    def test_an_unknown_key_is_refused_with_a_near_one(self, name, key):
        with pytest.raises(ConfigError) as caught:
            READERS[name]({key: 0.5})
        assert str(caught.value).startswith(f"{name}: got {key!r}, expected a known key. The nearest one is '")

    def test_reading_leaves_a_block_alone(self, name):
        block = {"sphere": {"cumulative_ratio": "3e-1"}, "rect": {"keep": "3e-1"}, "prune": {"base": "3e0"}}[name]
        before = copy.deepcopy(block)
        READERS[name](block)
        assert block == before


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"eta": 0.3}, SphereConfig(eta=0.3, alpha=0.7)),
        ({"alpha": 0.2, "basis": "pretrained"}, SphereConfig(alpha=0.2, basis="pretrained")),
        ({"alpha": "2e-1", "eta": "3e-1"}, SphereConfig(eta=0.3, alpha=0.2)),
        ({"row_normalize": False}, SphereConfig(alpha=0.7, row_normalize=False)),
        ({"cumulative_ratio": 0.3, "suppression_strength": "4e-1"}, SphereConfig(eta=0.3, alpha=0.4)),
        ({"cumulative_ratio": 0}, SphereConfig(alpha=0.0)),
        ({"alpha": None}, SphereConfig(alpha=0.7)),
        ({"alpha": 0}, SphereConfig(alpha=0)),
    ],
)
def test_a_sphere_block_is_read_over_the_methods_alpha(block, expected):
    assert read_sphere(block, 0.7) == expected


@pytest.mark.parametrize(
    ("name", "block", "culprit"),
    [
        ("sphere", {"eta": 2}, "sphere.eta"),
        ("sphere", {"eta": "much"}, "sphere.eta"),
        ("sphere", {"alpha": -1}, "sphere.alpha"),
        ("sphere", {"suppression_strength": 1.5}, "sphere.alpha"),
        ("sphere", {"basis": "original"}, "sphere.basis"),
        ("sphere", {"row_normalize": "no"}, "sphere.row_normalize"),
        ("sphere", {"eta": 0.5, "cumulative_ratio": 0.4}, "sphere.eta"),
        ("rect", {"keep": 0}, "rect.keep"),
        ("rect", {"keep": True}, "rect.keep"),
        ("prune", {"base": 1}, "prune.base"),
        ("prune", {"base": "e"}, "prune.base"),
    ],
)
def test_a_bad_value_in_a_block_is_named_with_its_block(name, block, culprit):
    with pytest.raises(ConfigError) as caught:
        READERS[name](block)
    assert caught.value.culprit == culprit
    error = refused(**{name: block})
    assert error.culprit == culprit, "a SPHERE YAML says the same"
    assert (error.expected, error.remedy) == (caught.value.expected, caught.value.remedy)


def test_the_message_of_a_value_in_a_block_is_that_of_its_class():
    with pytest.raises(ConfigError) as plain:
        RectConfig(keep=7)
    assert str(refused(rect={"keep": 7})) == "rect." + str(plain.value)


@pytest.mark.parametrize(
    ("key", "known", "near"),
    [("kepe", ["keep"], "keep"), ("ALPHA", ["eta", "alpha"], "alpha"), ("l2", ["L2", "lm"], "L2"), ("", ["a"], "a"),
     ("xyz", ["alpha"], "alpha")],
)  # fmt: skip
def test_the_nearest_key(key, known, near):
    assert nearest(key, known) == near
    assert nearest(key, iter(known)) == near


# ---- rect and prune ----


@pytest.mark.parametrize(
    ("changes", "rect", "prune"),
    [
        ({}, None, None),
        ({"rect": False, "prune": False}, None, None),
        ({"rect": None, "prune": None}, None, None),
        ({"rect": True}, RectConfig(), None),
        ({"rect": {"keep": "25e-2"}}, RectConfig(0.25), None),
        ({"prune": True, "rect": {"keep": 1}}, RectConfig(1), PruneConfig()),
        ({"prune": {"base": "2e0"}}, None, PruneConfig(2.0)),
        ({"prune": PruneConfig(3)}, None, PruneConfig(3)),
    ],
)
def test_rect_and_prune_are_asked_for_in_a_sphere_yaml(changes, rect, prune):
    hparams = made(**changes)
    assert (hparams.rect, hparams.prune) == (rect, prune)
    asked = [one for one in (rect, prune) if one is not None]
    assert hparams.editing().restraint() == (Chain((*asked, SphereConfig(alpha=0.5))) if asked else hparams.sphere())


METHODS = {"RECT": RectHyperParams, "PRUNE": PruneHyperParams}
OWN = {"RECT": RectConfig(), "PRUNE": PruneConfig()}


def test_each_method_has_the_class_that_errors_name():
    classes = [SphereHyperParams, *METHODS.values()]
    assert {cls.ALG_NAME: cls.__name__ for cls in classes} == dict(CLASSES)


@pytest.mark.parametrize("name", METHODS)
class TestMethods:
    """RECT and PRUNE: MEMIT with a restraint."""

    def made(self, name, **changes):
        return METHODS[name].from_mapping({**LEAST, **changes})

    def refused(self, name, **changes) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            self.made(name, **changes)
        return caught.value

    def test_the_least_yaml_is_memit_with_it_alone(self, name):
        hparams = self.made(name)
        assert (hparams.alg_name, hparams.base_method, hparams.projection) == (name, "MEMIT", "post")
        assert (hparams.rect, hparams.prune) == ((OWN[name], None) if name == "RECT" else (None, OWN[name]))
        assert hparams.editing().restraint() == Chain((OWN[name],))
        assert hparams.editing().method() == f"MEMIT + {name}"

    def test_what_it_does_not_say_is_as_in_sphere(self, name):
        ours, theirs = vars(self.made(name)), vars(made())
        apart = {"alg_name", "base_method", "projection", "alpha", name.lower()}
        assert {key for key in ours if ours[key] != theirs[key]} == apart

    @pytest.mark.parametrize(
        ("changes", "sphere"),
        [
            ({}, None),
            ({"alpha": None}, None),
            ({"alpha": 0}, None),
            ({"eta": 0.3}, None),
            ({"cumulative_ratio": 0.3, "basis": "pretrained"}, None),
            ({"sphere": False}, None),
            ({"sphere": False, "alpha": 0}, None),
            ({"sphere": False, "alpha": None}, None),
            ({"sphere": None}, None),
            ({"sphere": True}, SphereConfig(alpha=0.8)),
            ({"sphere": {}}, SphereConfig(alpha=0.8)),
            ({"sphere": True, "alpha": None}, SphereConfig(alpha=0.8)),
            ({"sphere": True, "alpha": 0.3}, SphereConfig(alpha=0.3)),
            ({"sphere": True, "suppression_strength": "3e-1"}, SphereConfig(alpha=0.3)),
            ({"sphere": True, "cumulative_ratio": 0}, None),
            ({"sphere": {"eta": 0.3}}, SphereConfig(eta=0.3, alpha=0.8)),
            ({"sphere": {"alpha": 0.3, "basis": "pretrained"}}, SphereConfig(alpha=0.3, basis="pretrained")),
            ({"sphere": {"suppression_strength": 0.3}}, SphereConfig(alpha=0.3)),
            ({"sphere": SphereConfig(0.2, 0.4)}, SphereConfig(0.2, 0.4)),
            ({"alpha": 0.6}, SphereConfig(alpha=0.6)),
            ({"suppression_strength": 0.6, "cumulative_ratio": 0.4}, SphereConfig(eta=0.4, alpha=0.6)),
        ],
    )
    def test_sphere_is_added_where_it_is_asked_for(self, name, changes, sphere):
        restraint = self.made(name, **changes).editing().restraint()
        assert restraint == Chain((OWN[name],) if sphere is None else (OWN[name], sphere))

    def test_sphere_is_not_both_off_and_on(self, name):
        assert self.refused(name, sphere=False, alpha=0.5).culprit == "alpha"
        assert self.refused(name, sphere=False, suppression_strength=0.5).culprit == "alpha"

    def test_its_own_block_sets_it(self, name):
        block, config = ({"keep": "3e-1"}, RectConfig(0.3)) if name == "RECT" else ({"base": "2e0"}, PruneConfig(2.0))
        assert self.made(name, **{name.lower(): block}).editing().restraint() == Chain((config,))
        assert self.made(name, **{name.lower(): True}) == self.made(name, **{name.lower(): None}) == self.made(name)

    def test_the_other_one_may_be_added(self, name):
        hparams = self.made(name, rect=True, prune=True, sphere=True)
        assert hparams.editing().restraint() == Chain((RectConfig(), PruneConfig(), SphereConfig(alpha=0.8)))

    def test_it_cannot_be_switched_off(self, name):
        error = self.refused(name, **{name.lower(): False})
        assert str(error).startswith(f"{name.lower()}: got False, expected true, or a block")
        assert "alg_name: SPHERE" in error.remedy and "alpha: 0" in error.remedy
        with pytest.raises(ConfigError, match=f"{name.lower()}: got None"):
            METHODS[name](**LEAST, **{name.lower(): None})

    @pytest.mark.parametrize("base", ["AlphaEdit", "ROME", "memit", None])
    def test_another_base_method_is_refused(self, name, base):
        error = self.refused(name, base_method=base)
        assert str(error).startswith(f"base_method: got {base!r}, expected MEMIT, which {name} builds on")
        assert f"alg_name: SPHERE, base_method: AlphaEdit and {name.lower()}: true" in error.remedy

    def test_only_its_own_name_is_taken(self, name):
        for other in {"SPHERE", *METHODS, "FT"} - {name}:
            error = self.refused(name, alg_name=other)
            assert str(error).startswith(f"alg_name: got {other!r}, expected {name}. ")
            loader = "EasyEdit's own classes" if other == "FT" else f"{other.title()}HyperParams loads {other}."
            assert loader in error.remedy
        assert f"{name.title()}HyperParams loads {name}." in refused(alg_name=name).remedy

    def test_another_methods_yaml_is_told_apart_before_its_keys(self, name):
        with pytest.raises(ConfigError, match="alg_name: got 'FT'"):
            METHODS[name].from_mapping({"alg_name": "FT", "num_steps": 25})

    def test_it_can_be_made_without_a_yaml(self, name):
        assert METHODS[name](**LEAST) == self.made(name)
        hparams = METHODS[name](**LEAST, alpha=0.8, eta=0.3, projection="in_loop")
        assert hparams.editing().restraint() == Chain((OWN[name], SphereConfig(eta=0.3, alpha=0.8)))
        assert hparams.projection == "in_loop"
        assert METHODS[name](**LEAST, alpha=None).alpha == dataclasses.replace(hparams, alpha=None).alpha == 0.0

    def test_what_is_written_comes_back(self, name):
        for changes in ({}, {"sphere": {"eta": 0.3}}, {"rect": {"keep": 0.1}, "prune": {"base": 1.2}}):
            hparams = self.made(name, **changes)
            text = yaml.safe_dump(dataclasses.asdict(hparams))
            assert METHODS[name].from_mapping(yaml.safe_load(text)) == hparams
            assert METHODS[name].from_mapping(vars(hparams)) == hparams

    def test_objects_come_back_as_they_are(self, name):
        hparams = self.made(name)
        assert SphereHyperParams.of(hparams) is METHODS[name].of(hparams) is hparams
        with pytest.raises(ConfigError, match=f"alg_name: got 'SPHERE', expected {name}. SphereHyperParams loads"):
            METHODS[name].of(made())
        assert METHODS[name].of(SimpleNamespace(**LEAST, alg_name=name)) == hparams

    def test_unknown_and_missing_keys_are_named_as_ever(self, name):
        assert "'prune'" in self.refused(name, prunes=True).remedy
        with pytest.raises(ConfigError) as caught:
            METHODS[name].from_mapping({"alg_name": name})
        assert sorted(caught.value.got) == sorted(LEAST)

    def test_the_shipped_yaml_is_that_of_sphere_with_memit(self, name):
        path = ROOT / "hparams" / name / "smollm2-135m.yaml"
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        hparams = METHODS[name].from_hparams(path)
        assert {key: getattr(hparams, key) for key in written} == {**written, name.lower(): OWN[name]}
        sphere = SphereHyperParams.from_hparams(FOLDER / "smollm2-135m")
        wanted = dataclasses.replace(sphere, base_method="MEMIT", alpha=0.0, projection="post")
        idle = {"alg_name": name, name.lower(): OWN[name], "nullspace_threshold": 0.02, "L2": 10.0}  # or AlphaEdit's
        assert vars(hparams) == {**vars(wanted), **idle}
        (commented,) = re.findall(r"(?m)^# (sphere: true)$", path.read_text(encoding="utf-8"))
        with_sphere = METHODS[name].from_mapping({**written, **yaml.safe_load(commented)})
        assert with_sphere.editing().method() == f"MEMIT + {name} + SPHERE" and with_sphere.alpha == 0.8

    def test_its_defaults_are_documented(self, name):
        head, *rows = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in DOCS.read_text(encoding="utf-8").splitlines()
            if re.match(r"\| (\||base_method|projection|rect|prune|alpha)", line)
        ]
        told = {row[0].partition(",")[0]: row[head.index(name)] for row in rows}
        hparams = self.made(name)
        assert told["base_method"].startswith("MEMIT") and told["projection"].startswith("`post`")
        assert told[name.lower()].startswith("`{keep: 0.4}`" if name == "RECT" else "`{base: e}`")
        assert told["alpha"].startswith(f"{hparams.alpha:g}:")


# ---- objects ----


class TheirHyperParams:
    """What EasyEdit's own SPHERE class looks like from outside."""

    def __init__(self) -> None:
        self.alg_name, self.model_name, self.device = "SPHERE", "some/model", 1
        self.layers, self.layer_selection, self.fact_token = [4, 5], "all", "last"
        self.rewrite_module_tmp, self.layer_module_tmp = "h.{}.mlp.fc_out", "h.{}"
        self.mlp_module_tmp, self.attn_module_tmp = "h.{}.mlp", "h.{}.attn"
        self.ln_f_module, self.lm_head_module = "ln_f", "lm_head"
        self.v_num_grad_steps, self.v_lr, self.v_loss_layer, self.v_weight_decay = 20, 0.2, 27, 0.3
        self.clamp_norm_factor, self.kl_factor, self.L2 = 0.6, 0.1, 2
        self.mom2_adjustment, self.mom2_update_weight, self.mom2_dtype = True, 7000, "float32"
        self.mom2_dataset, self.mom2_n_samples, self.nullspace_threshold = "wikitext", 500, 0.03
        self.stats_dir, self.P_loc = "./stats", "./null_space_project.pt"
        self.cumulative_ratio, self.suppression_strength = 0.4, 0.7
        self.max_length, self.batch_size, self.model_parallel = 30, 8, True


class TestObjects:
    def test_an_object_with_easyedits_names_is_read(self):
        theirs = TheirHyperParams()
        ours = SphereHyperParams.of(theirs)
        assert (ours.eta, ours.alpha) == (0.4, 0.7)
        shared = vars(theirs).keys() - UNUSED.keys() - SYNONYMS.keys()
        assert {key: getattr(ours, key) for key in shared} == {key: getattr(theirs, key) for key in shared}
        assert vars(theirs) == vars(TheirHyperParams())  # untouched

    def test_an_attribute_that_is_not_known_is_refused(self):
        with pytest.raises(ConfigError, match="got 'ffn_size'"):
            SphereHyperParams.of(SimpleNamespace(**LEAST, ffn_size=4))

    def test_what_scripts_hang_on_an_object_for_easyedits_evaluators_is_left_to_them(self):
        values = vars(TheirHyperParams())
        theirs = dataclasses.make_dataclass("Theirs", values)(**values)
        theirs.evaluation_type, theirs.api_key = "LLM-judge", "none"
        assert SphereHyperParams.of(theirs) == SphereHyperParams.of(TheirHyperParams())
        theirs.alpha = 0.3  # ours beside theirs: two values for one thing
        with pytest.raises(ConfigError, match="alpha"):
            SphereHyperParams.of(theirs)

    @pytest.mark.parametrize("value", [False, True, {"alpha": 0.1}])
    def test_the_key_is_for_yamls_and_not_for_our_objects(self, value: object):
        with pytest.raises(ConfigError, match=r"sphere: got .*Set alpha \(0 switches the projection off\)"):
            made().sphere = value

    def test_an_object_of_another_method_is_refused(self):
        with pytest.raises(ConfigError, match="alg_name: got 'AlphaEdit'"):
            SphereHyperParams.of(SimpleNamespace(**LEAST, alg_name="AlphaEdit"))

    def test_our_own_come_back_as_they_are(self):
        hparams = made()
        assert SphereHyperParams.of(hparams) is hparams

    def test_editing_gives_the_editors_part(self):
        hparams = made(eta=0.3, alpha=0.2, layers=[3, 4], seed=7, batch_size=9)
        editing = hparams.editing()
        assert type(editing) is EditingConfig
        names = [field.name for field in dataclasses.fields(EditingConfig)]
        assert vars(editing) == {name: getattr(hparams, name) for name in names}

    def test_editing_gives_a_copy_that_stands_alone(self):
        hparams = made(layers=[3, 4], context_template_length_params=[[10, 5]])
        editing = hparams.editing()
        editing.layers.append(5)
        editing.context_template_length_params[0][1] = 1
        editing.eta = 0.1
        assert (hparams.layers, hparams.context_template_length_params, hparams.eta) == ([3, 4], [[10, 5]], 0.5)
        assert hparams.editing() == made(layers=[3, 4]).editing() != editing

    def test_editing_checks_what_was_changed_since(self):
        hparams = made()
        hparams.eta = 2.0
        with pytest.raises(ConfigError, match="eta: got 2.0"):
            hparams.editing()

    def test_two_objects_share_no_default(self):
        first, second = made(), made()
        first.context_template_length_params.append([1, 1])
        assert second.context_template_length_params == [[10, 5]]


# ---- docs/hparams.md ----


def documented() -> list[tuple[str, list[str]]]:
    """Key and further cells of every row of a table whose first cell is a key."""
    rows = [line.strip("|").split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [(row[0].strip("`"), row[1:]) for row in cells if re.fullmatch(r"`\w+`", row[0])]


class TestDocs:
    def test_every_field_is_there_once_and_nothing_else(self):
        classes = (SphereHyperParams, EditingConfig, SphereConfig)
        fields = {field.name for each in classes for field in dataclasses.fields(each)}
        assert sorted(key for key, _ in documented()) == sorted([*fields, *UNUSED, *SYNONYMS])

    def test_the_defaults_are_those_of_the_code(self):
        told = {key: cells[1] for key, cells in documented() if len(cells) == 4}
        for field in dataclasses.fields(SphereHyperParams):
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            elif field.default is not dataclasses.MISSING:
                default = field.default
            else:
                assert told[field.name] == "required"
                continue
            assert re.fullmatch(r"`[^`]+`", told[field.name]), field.name
            assert yaml.safe_load(told[field.name].strip("`")) == default, field.name

    def test_every_choice_is_named(self):
        told = {key: cells[0] for key, cells in documented() if len(cells) == 4}
        for key in ("base_method", "fact_token", "projection", "basis"):
            expected = refused(**{key: "no such choice"}).expected.removeprefix("one of ")
            assert set(re.split(r", | or ", expected)) == set(re.findall(r"`(\w+)`", told[key])), key

    def test_every_yaml_is_listed_as_run_or_not(self):
        text = DOCS.read_text(encoding="utf-8")
        rows = dict(re.findall(r"(?m)^\| `([\w.-]+)\.yaml` \| (yes|no) \|", text))
        assert rows == {name: "yes" if name == "smollm2-135m" else "no" for name in DEPTH}

    def test_the_depths_of_the_models_it_was_checked_with_are_true(self):
        text = DOCS.read_text(encoding="utf-8")
        rows = re.findall(r"(?m)^\| `([\w.-]+)\.yaml` .* of (\d+) layers, width 32 \|$", text)
        assert {name: int(layers) for name, layers in rows} == {
            name: depth for name, depth in DEPTH.items() if name != "smollm2-135m"
        }


def test_a_random_choice_of_layers_is_refused_rather_than_overlooked():
    with pytest.raises(ConfigError, match="layer_selection: got 'random', expected all"):
        SphereHyperParams.from_mapping({"alg_name": "SPHERE", "layer_selection": "random"})
