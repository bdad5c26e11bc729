"""The edits of a run as a model, as exact differences, and as a LoRA."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pico import save_pico
from test_journal_store import Walk, touched
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sphere_plugin as sp
from sphere_plugin import CacheError, ConfigError, HostError, ModelError
from sphere_plugin.cli import main
from sphere_plugin.files import read_json, write_json
from sphere_plugin.geometry.neurons import neurons
from sphere_plugin.journaling import Journal
from sphere_plugin.journaling.batch import same_bits
from sphere_plugin.journaling.card import LISTED
from sphere_plugin.journaling.lowrank import cut


class Run(Walk):
    """The folder of a run on a saved pico model."""

    def __init__(self, folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, kind, dtype)
        self.folder, self.kind, self.dtype = folder, kind, dtype
        self.model = str(save_pico(kind, folder / "model"))
        manifest = {
            "format": 1,
            "entry": "memit+sphere",
            "label": "MEMIT + SPHERE",
            "method": {"alg_name": "SPHERE", "hparams": {"eta": 0.5, "alpha": 0.8, "layers": [1, 2]}},
            "model": {
                "name": self.model,
                "dtype": str(dtype).removeprefix("torch."),
                "weights": self.journal.fingerprint(0),
            },
        }
        write_json(folder / "manifest.json", manifest)
        for _ in range(3):
            self.step(facts=2)

    def load(self, edits: int = 0, seed: int = 0) -> PreTrainedModel:
        """The model with the weights after so many edits."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()
        weights = touched(model, self.kind)
        with torch.no_grad():
            for name, weight in self.states[edits // 2].items():
                weights[name].copy_(weight)
        return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


BOTH = pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16), ("gpt2", torch.float32)]
)


# ---- the model ----


@BOTH
@pytest.mark.parametrize("at", [0, 4, None])
def test_the_edited_model_says_what_the_run_said(
    kind: str, dtype: torch.dtype, at: int | None, tmp_path: Path
) -> None:
    run = Run(tmp_path, kind, dtype)
    exported = sp.export(tmp_path, tmp_path / "out", at=at)
    edits = 6 if at is None else at
    assert (exported.path, exported.format, exported.edits) == (tmp_path / "out", "hf", edits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(run.load(edits)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("one two").input_ids
    facts = read_json(tmp_path / "out" / "edits.json")
    assert len(facts) == edits // 2 and all(set(fact) == {"prompt", "subject", "target_new"} for fact in facts)
    told = (tmp_path / "out" / "README.md").read_text()
    assert "an edited model" in told and f"| edits | {edits} |" in told and "| alpha | 0.8 |" in told


def test_the_readme_does_not_say_where_the_model_lies(tmp_path: Path) -> None:
    run = Run(tmp_path)
    sp.export(tmp_path, tmp_path / "out")
    told = (tmp_path / "out" / "README.md").read_text()
    name = Path(run.model).name
    assert f'base_model: "{name}"' in told and f"# {name}: an edited model" in told and str(tmp_path) not in told


def test_the_readme_lists_the_first_and_says_where_all_are(tmp_path: Path) -> None:
    run = Run(tmp_path)
    facts = [{"prompt": f"```\n| {number} *", "subject": "|", "target_new": "é"} for number in range(LISTED + 5)]
    run.journal.append({"edits": 31, "facts": facts}, run.weights)
    sp.export(tmp_path, tmp_path / "out")
    told = (tmp_path / "out" / "README.md").read_text()
    assert f"The first {LISTED} of {LISTED + 8} edits:" in told and "`edits.json`" in told
    assert '4. "```\\n| 0 *" -> "é"' in told and f"{LISTED + 1}. " not in told
    assert read_json(tmp_path / "out" / "edits.json")[-1] == facts[-1]


def test_the_readme_says_what_was_measured_at_that_very_moment(tmp_path: Path) -> None:
    Run(tmp_path)
    scores = {"efficacy": [1.0, 0.5, 0.0], "generalization": [None] * 3, "specificity": [0.25, None, 0.0]}
    point = {"edits": 4, "scored": [0, 1, 3], "scores": scores | {"locality": [1.0, 1.0, 0.5], "nll": 3.21987}}
    write_json(tmp_path / "checkpoints" / "000004.json", point)
    sp.export(str(tmp_path), str(tmp_path / "four"), at=4)
    told = (tmp_path / "four" / "README.md").read_text()
    assert "3 of 4 edits asked again" in told
    assert "| efficacy | 50.0 (of 3) |" in told and "| specificity | 12.5 (of 2) |" in told
    assert "| generalization | not scored |" in told and "| held-out text, nats per token | 3.220 |" in told
    write_json(tmp_path / "checkpoints" / "000004.json", {**point, "scores": {**point["scores"], "nll": None}})
    sp.export(tmp_path, tmp_path / "again", at=4)
    assert "per token | not finite |" in (tmp_path / "again" / "README.md").read_text()
    sp.export(tmp_path, tmp_path / "six")
    assert "was not measured after 6 of them" in (tmp_path / "six" / "README.md").read_text()


def test_the_readme_has_the_scores_of_the_protocol(tmp_path: Path) -> None:
    Run(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    protocol = {"efficacy": "exact", "generalization": "exact", "specificity": "tokens"}
    write_json(tmp_path / "manifest.json", manifest | {"protocol": protocol})
    scores = {name: [0.75, 0.25] for name in ("efficacy", "generalization", "specificity", "locality")}
    exact = {f"{name}_exact": [1.0, 1.0] for name in ("efficacy", "generalization", "specificity")}
    write_json(tmp_path / "checkpoints" / "000006.json", {"scored": [0, 1], "scores": scores | exact | {"nll": 3.0}})
    sp.export(tmp_path, tmp_path / "out")
    told = (tmp_path / "out" / "README.md").read_text()
    assert "| efficacy (exact) | 100.0 (of 2) |" in told and "| generalization (exact) | 100.0 (of 2) |" in told
    assert "| specificity (tokens) | 50.0 (of 2) |" in told and "| locality | 50.0 (of 2) |" in told


def test_another_model_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other = save_pico("llama", tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="Name the model that was edited"):
        sp.export(tmp_path, tmp_path / "out", model=str(other))
    with pytest.raises(ModelError, match="got 'no model.layers.2.mlp.down_proj.weight'"):
        sp.export(tmp_path, tmp_path / "out", model=str(save_pico("gpt2", tmp_path / "third")))
    assert not (tmp_path / "out").exists()
    Path(run.model).rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="expected an existing folder"):
        sp.export(tmp_path, tmp_path / "out")
    sp.export(tmp_path, tmp_path / "out", model=str(tmp_path / "moved"))


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="The nearest are 2 and 4"):
        sp.export(tmp_path, out, at=3)
    with pytest.raises(ConfigError, match="format: got 'gguf'"):
        sp.export(tmp_path, out, format="gguf")
    with pytest.raises(ConfigError, match="Only an adapter has a rank"):
        sp.export(tmp_path, out, rank=3)
    for rank in (0, 33):
        with pytest.raises(ConfigError, match=f"rank: got {rank}, expected a whole number from 1 to 32"):
            sp.export(tmp_path, out, format="adapter", rank=rank)
    with pytest.raises(CacheError, match="Give the folder of a run"):
        sp.export(tmp_path / "model", out)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "weights_after", lambda *_: pytest.fail("batches were added up"))
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(HostError, match="the package peft: got 'not installed'"):
            sp.export(tmp_path, out, format="adapter")
    assert not out.exists()
    out.mkdir()
    for format in ("hf", "delta", "adapter"):
        with pytest.raises(ConfigError, match="expected a path where nothing is"):
            sp.export(tmp_path, out, format=format)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", {**manifest, "model": {**manifest["model"], "weights": "0" * 32}})
    with pytest.raises(CacheError, match="not of one run"):
        sp.export(tmp_path, tmp_path / "new")
    write_json(tmp_path / "manifest.json", {"format": 1})
    with pytest.raises(CacheError, match="what model the run edited"):
        sp.export(tmp_path, tmp_path / "new")


# ---- exact differences ----


@BOTH
def test_a_delta_is_applied_and_taken_back_to_the_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = Run(tmp_path, kind, dtype)
    exported = sp.export(tmp_path, tmp_path / "x.safetensors", format="delta")
    model = run.load()
    told = sp.apply_delta(model, exported.path)
    assert told == {"edits": "6", "entry": "memit+sphere", "model": Path(run.model).name}
    now = touched(model, kind)
    assert all(same_bits(weight.detach(), run.states[3][name]) for name, weight in now.items())
    assert torch.equal(logits(model), logits(run.load(6)))
    with pytest.raises(ModelError, match="edited already.*revert=True"):
        sp.apply_delta(model, exported.path)
    sp.apply_delta(model, exported.path, revert=True)
    assert all(same_bits(weight.detach(), run.states[0][name]) for name, weight in now.items())
    with pytest.raises(ModelError, match="not edited"):
        sp.apply_delta(model, exported.path, revert=True)


def test_a_delta_is_refused_on_another_model(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = sp.export(tmp_path, tmp_path / "x.safetensors", format="delta", at=4).path
    first, second = run.weights
    model = run.load()
    with torch.no_grad():
        model.get_parameter(second)[0, 0] += 1.0
    before = {name: weight.clone() for name, weight in touched(model, "llama").items()}
    with pytest.raises(ModelError, match=f"{second}: got 'torch.float32 .*1 of 2 weights differ"):
        sp.apply_delta(model, path)
    assert all(torch.equal(weight, before[name]) for name, weight in touched(model, "llama").items())
    with pytest.raises(ModelError, match=f"{first}: got 'torch.bfloat16 .*in the dtype it was edited in"):
        sp.apply_delta(run.load().bfloat16(), path)
    with pytest.raises(ModelError, match="got 'not there'"):
        sp.apply_delta(torch.nn.Linear(2, 2), path)
    with pytest.raises(ModelError, match="edited weights"):
        sp.apply_delta(run.load(6), path, revert=True)
    with pytest.raises(ModelError, match="sphere export --format delta"):
        sp.apply_delta(run.load(), tmp_path / "journal" / "base.safetensors")


# ---- an adapter ----


@BOTH
def test_an_adapter_is_the_best_of_its_rank(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = Run(tmp_path, kind, dtype)
    exported = sp.export(tmp_path, tmp_path / "out", format="adapter", rank=4)
    assert exported.rank == 4 and list(exported.errors) == list(run.weights)
    base = run.load()
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    layers = {name.removeprefix("base_model.model."): one for name, one in model.named_modules()}
    for name, error in exported.errors.items():
        delta = neurons((run.states[3][name].double() - run.states[0][name].double()), kind == "gpt2")
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        assert error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-5)
        assert 0.01 < error < 0.9
        layer = layers[name.removesuffix(".weight")]
        best = (left[:, :4] * values[:4]) @ right[:4]
        got = layer.get_delta_weight("default")
        torch.testing.assert_close(neurons(got, kind == "gpt2").double(), best, rtol=0, atol=1e-6 * float(best.norm()))
        assert layer.scaling["default"] == 1.0
    told = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| `{name}` | {error:.4g} |" for name, error in exported.errors.items() if name in told)
    assert "edits as a LoRA adapter" in told
    assert len(read_json(tmp_path / "out" / "edits.json")) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_of_the_whole_rank_is_the_edited_model(kind: str, tmp_path: Path) -> None:
    run = Run(tmp_path, kind)
    exported = sp.export(tmp_path, tmp_path / "out", format="adapter")
    assert exported.rank == 9 and max(exported.errors.values()) < 1e-6  # three updates of rank three
    model = PeftModel.from_pretrained(run.load(), tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(run.load(6)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(run.load()), rtol=1e-2, atol=1e-2)
    merged = model.merge_and_unload()
    for name, weight in touched(merged, kind).items():
        torch.testing.assert_close(weight.detach(), run.states[3][name], rtol=0, atol=1e-5)


def test_an_adapter_before_the_first_edit_does_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    exported = sp.export(tmp_path, tmp_path / "out", format="adapter", at=0)
    assert exported.rank == 1 and set(exported.errors.values()) == {0.0}
    assert torch.equal(logits(PeftModel.from_pretrained(run.load(), tmp_path / "out")), logits(run.load()))


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path), str(out), "--format", "adapter", "--rank", "2", "--at", "2"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{out}: 2 edits, adapter, rank 2" and len(rest) == 2
    assert all("% of the update missing" in line for line in rest)
    assert main(["export", str(tmp_path), str(tmp_path / "model2"), "--model", run.model]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model2'}: 6 edits, hf\n"
    assert main(["export", str(tmp_path), str(out)]) == 1
    assert "a path where nothing is" in capsys.readouterr().err


def test_an_update_that_is_not_finite_is_no_adapter() -> None:
    update = torch.ones(4, 6)
    update[1, 2] = float("nan")
    with pytest.raises(ModelError, match="the update of w: got 'NaN or infinite entries'"):
        cut([("w", update)], None)
