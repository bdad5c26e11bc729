"""`sphere doctor`: what is there, what a YAML will touch and cost, what is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATES
from pico import pico, save_pico

import sphere_plugin as sp
from sphere_plugin import ConfigError, HostError, cli
from sphere_plugin.easyedit.doctor import Finding, examine
from sphere_plugin.easyedit.host import find_host
from sphere_plugin.models.stored import stored_weight, structure

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(alg_name, kind="llama", **changes) -> a YAML for a saved pico model."""

    def make(alg_name: str, kind: str = "llama", **changes: object) -> Path:
        folder = tmp_path / f"pico-{kind}"
        if not folder.exists():
            save_pico(kind, folder)
        layer, rewrite, norm = TEMPLATES[kind]
        keys: dict[str, Any] = {
            "alg_name": alg_name,
            "model_name": str(folder),
            "device": "cpu",
            "layers": [1, 2],
            "rewrite_module_tmp": f"{layer}.{rewrite}",
            "layer_module_tmp": layer,
            "ln_f_module": norm,
            "lm_head_module": "lm_head",
        }
        if alg_name == "ROME":
            keys |= {
                "fact_token": "subject_last",
                "v_num_grad_steps": 5,
                "v_lr": 0.5,
                "v_loss_layer": 3,
                "v_weight_decay": 0.1,
                "clamp_norm_factor": 4,
                "kl_factor": 0.1,
                "mom2_adjustment": False,
                "context_template_length_params": [[5, 2]],
                "mlp_module_tmp": f"{layer}.mlp",
                "attn_module_tmp": f"{layer}.self_attn" if kind == "llama" else f"{layer}.attn",
                "mom2_dataset": "wikipedia",
                "mom2_n_samples": 10,
                "mom2_dtype": "float32",
                "stats_dir": "./stats",
                "max_length": 40,
                "model_parallel": False,
            }
        path = tmp_path / f"{alg_name}.yaml"
        path.write_text(yaml.safe_dump({**keys, **changes}))
        return path

    return make


def one(findings: list[Finding], topic: str) -> Finding:
    (found,) = [finding for finding in findings if finding.topic == topic]
    return found


def test_without_a_yaml_it_names_what_is_there() -> None:
    findings = examine()
    assert torch.__version__ == one(findings, "torch").text
    assert find_host().version in one(findings, "EasyEdit").text
    assert not [finding for finding in findings if finding.verdict == "missing"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_our_own_method(write: Any, kind: str) -> None:
    findings = examine(write("SPHERE", kind, alpha=0.8))
    assert one(findings, "method").text == "SPHERE, our own editor"
    assert one(findings, "weights").text.startswith("2 may be changed")
    model, _ = pico(kind)
    named = dict(model.named_parameters())
    layer, rewrite, _ = TEMPLATES[kind]
    stored = [named[f"{layer.format(number)}.{rewrite}.weight"] for number in (1, 2)]
    weights = [weight.T if kind == "gpt2" else weight for weight in stored]
    ranks = [sp.PrincipalSpace.fit(weight, 0.5).rank for weight in weights]
    said = one(findings, "projection").text
    assert f"r {min(ranks)} to {max(ranks)} of {weights[0].shape[1]} directions" in said
    assert f"to {100 * 0.96 * max(ranks) / weights[0].shape[1]:.1f} % go" in said
    assert "measured on 2 of 2 weights" in said
    needs = one(findings, "memory")
    assert needs.verdict == "ok" and re.match(r"float32, batches of 1: needs [\d.]+ MiB on cpu while \w+", needs.text)


def test_a_method_of_easyedit_with_and_without_the_key(write: Any) -> None:
    plain = examine(write("ROME"))
    assert one(plain, "method").verdict == "note"
    assert "`sphere: true`" in one(plain, "method").text
    assert not [finding for finding in plain if finding.topic == "projection"]
    findings = examine(write("ROME", sphere={"alpha": 1.0}, rect=True))
    assert one(findings, "method").text == "ROME + RECT + SPHERE"
    assert "α 1" in one(findings, "projection").text


def test_a_module_that_is_not_there_is_named_with_the_nearest(write: Any) -> None:
    findings = examine(write("ROME", mlp_module_tmp="model.layers.{}.mpl"))
    assert one(findings, "mlp_module_tmp") == Finding(
        "mlp_module_tmp", "model.layers.1.mpl is not in the model; the nearest is model.layers.1.mlp", "missing"
    )
    findings = examine(write("ROME", rewrite_module_tmp="model.layers.{}.mlp.c_proj"))
    assert one(findings, "rewrite_module_tmp").verdict == "missing"
    assert one(findings, "YAML").verdict == "missing"  # and so no weight to touch


@pytest.mark.parametrize(
    ("method", "changes", "topic", "words"),
    [
        ("ROME", {"sphere": {"alfa": 1}}, "YAML", "alpha"),
        ("ROME", {"model_name": "/no/such/folder"}, "YAML", "/no/such/folder"),
        ("ROMA", {}, "YAML", "'ROME'"),
        ("ROME", {"device": 7}, "device", "cuda:7"),
        ("ROME", {"rewrite_module_tmp": "model.layers.{layer}.mlp.down_proj"}, "YAML", "layer's number"),
        ("ROME", {"rewrite_module_tmp": "model.layers.{}.{}.down_proj"}, "YAML", "layer's number"),
        ("ROME", {"rewrite_module_tmp": "model.layers.{.mlp.down_proj"}, "YAML", "layer's number"),
        ("ROME", {"layers": 1}, "YAML", "a list of layer numbers"),
        ("ROME", {"layers": None}, "YAML", "a list of layer numbers"),
        ("ROME", {"rewrite_module_tmp": "model.layers.{}.input_layernorm"}, "weights", "a matrix"),
    ],
)
def test_what_is_wrong_is_a_finding(
    write: Any, method: str, changes: dict[str, Any], topic: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = one(examine(write(method, **changes)), topic)
    assert found.verdict == "missing"
    assert words in found.text


def test_a_layer_that_is_not_there_is_told_once(write: Any) -> None:
    missing = [finding for finding in examine(write("ROME", layers=[1, 40])) if finding.verdict == "missing"]
    assert missing == [Finding("layers", "[40] are not there: the model has 0 to 3", "missing")]


def test_a_file_that_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphere_plugin.easyedit.doctor.register", lambda: pytest.fail("EasyEdit is loaded"))
    (found,) = examine(tmp_path / "none.yaml")
    assert (found.topic, found.verdict) == ("YAML", "missing")
    assert f"a relative one is looked up in {Path.cwd()}" in found.text


@pytest.mark.parametrize(("device", "told"), [("mps", "on mps with"), ("0", "on cuda:0 with")])
def test_devices_are_read_as_easyedit_reads_them(
    write: Any, device: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = examine(write("ROME", device=device))
    assert told in one(findings, "memory").text
    assert [finding.verdict for finding in findings if finding.topic == "device"] == ["missing"] * (device == "0")


def test_a_method_without_a_weight_update(tmp_path: Path) -> None:
    path = tmp_path / "ike.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "alg_name": "IKE",
                "model_name": "./models/llama",
                "sentence_model_name": "mini",
                "device": 0,
                "results_dir": "./results",
                "k": 4,
                "model_parallel": False,
                "sphere": True,
            }
        )
    )
    found = one(examine(path), "restraint")
    assert found.verdict == "missing"
    assert "prompt" in found.text


def test_the_easyedit_behind_it_is_as_before(write: Any) -> None:
    from sphere_plugin.easyedit.host import load_host

    before = dict(load_host().alg_dict)
    examine(write("ROME", sphere=True))
    after = load_host().alg_dict
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)


def test_the_command_prints_it_and_says_whether_all_is_there(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(write("SPHERE"))]) == 0
    assert capsys.readouterr().out.strip().endswith("ready")
    assert cli.main(["doctor", str(write("SPHERE", ln_f_module="norm"))]) == 1
    said = capsys.readouterr().out
    assert "missing ln_f_module" in said
    assert said.strip().endswith("1 thing missing")


def test_a_missing_yaml(tmp_path: Path) -> None:
    assert "no.yaml" in one(examine(tmp_path / "no.yaml"), "YAML").text


# ---- looking into a model ----


def test_structure_has_shapes_and_no_values(tmp_path: Path) -> None:
    model = structure(str(save_pico("gpt2", tmp_path / "model")))
    real, _ = pico("gpt2")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_stored_weights_are_read_one_by_one(tmp_path: Path, shard: str) -> None:
    model, _ = pico("llama")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        read = stored_weight(str(tmp_path), name)
        assert read is not None
        assert torch.equal(read, model.get_parameter(name))
    assert stored_weight(str(tmp_path), "model.layers.9.mlp.down_proj.weight") is None


def test_a_model_without_safetensors_has_no_stored_weight(tmp_path: Path) -> None:
    pico("llama")[0].config.save_pretrained(tmp_path)
    assert stored_weight(str(tmp_path), "model.norm.weight") is None


def test_a_structure_that_cannot_be_had_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(sp.ModelError, match="model_name"):
        structure(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="nearest one is 'ROME'"):
        from sphere_plugin.easyedit.doctor import load_any

        path = tmp_path / "x.yaml"
        path.write_text("alg_name: ROMM\n")
        host = sp.register()
        try:
            load_any(path, host)
        finally:
            sp.unregister()
