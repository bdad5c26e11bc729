"""The host of EasyEdit: found, loaded without side effects, and able to edit on a CPU.

A Python process holds one `easyeditor`, so whatever loads a host does so in a process of its own.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import save_pico

from sphere_plugin.easyedit import loader, standins
from sphere_plugin.easyedit.host import Host, HostLocation, find_host
from sphere_plugin.errors import ConfigError, HostError

HERE = Path(__file__).parent
HOME = os.environ.get("EASYEDIT_HOME", "")


def _pypi_folder() -> Path | None:
    try:
        distribution = importlib.metadata.distribution("easyeditor")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file("easyeditor")))


needs_main = pytest.mark.skipif(not HOME, reason="EASYEDIT_HOME is not set: no checkout of EasyEdit to test with")
needs_pypi = pytest.mark.skipif(_pypi_folder() is None, reason="easyeditor 0.0.1.dev0 is not installed")
HOSTS = [pytest.param("pypi", marks=needs_pypi), pytest.param("main", marks=needs_main)]


def run(script: str, folder: Path, kind: str = "pypi", *arguments: str, home: str | None = None) -> Any:
    """Run a script in a fresh process and return what it handed to `report`; "main" sees EASYEDIT_HOME."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("EASYEDIT_HOME", None)
    if home is not None or kind == "main":
        environment["EASYEDIT_HOME"] = home if home is not None else HOME
    prelude = "import json, sys\nreport = lambda what: open('report.json', 'w').write(json.dumps(what))\n"
    command = [sys.executable, "-c", prelude + script, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def fake_checkout(folder: Path, source: str = "") -> Path:
    (folder / "easyeditor").mkdir(parents=True)
    (folder / "easyeditor" / "__init__.py").write_text(source)
    return folder


# ---- finding ----


class TestFinding:
    @pytest.mark.parametrize("wrong", ["missing", "empty"])
    def test_a_wrong_home_is_named_with_the_remedy(self, wrong, tmp_path, monkeypatch):
        (tmp_path / "empty").mkdir()
        monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / wrong))
        with pytest.raises(HostError, match=r"EASYEDIT_HOME: got '.*" + wrong + r"'.*git clone") as caught:
            find_host()
        assert "easyeditor/__init__.py" in caught.value.expected

    def test_a_checkout_without_git_is_main(self, tmp_path, monkeypatch):
        monkeypatch.setenv("EASYEDIT_HOME", str(fake_checkout(tmp_path)))
        assert find_host() == HostLocation("main", tmp_path.resolve() / "easyeditor", "main")

    def test_a_distribution_beside_the_package_makes_it_the_release(self, tmp_path, monkeypatch):
        info = fake_checkout(tmp_path) / "easyeditor-0.0.1.dev0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: easyeditor\nVersion: 0.0.1.dev0\n")
        monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
        assert (find_host().kind, find_host().version) == ("pypi", "0.0.1.dev0")

    @pytest.mark.parametrize("layout", ["loose", "packed", "detached", "worktree"])
    def test_the_commit_is_read_from_gits_files(self, layout, tmp_path, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        git = tmp_path / ("elsewhere" if layout == "worktree" else "home") / ".git"
        (git / "refs" / "heads").mkdir(parents=True)
        fake_checkout(tmp_path / "home")
        (git / "HEAD").write_text(f"{commit}\n" if layout == "detached" else "ref: refs/heads/main\n")
        if layout == "packed":
            (git / "packed-refs").write_text(f"# pack-refs\n{'f' * 40} refs/heads/other\n{commit} refs/heads/main\n")
        else:
            (git / "refs" / "heads" / "main").write_text(f"{commit}\n")
        if layout == "worktree":
            (tmp_path / "home" / ".git").write_text("gitdir: ../elsewhere/.git\n")
            (git / "commondir").write_text(".\n")
        monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "home"))
        assert find_host().version == "main@0123456"

    def test_nothing_found_names_both_ways_to_get_one(self, tmp_path):
        message = run(
            "import sphere_plugin.easyedit.host as host\n"
            "from pathlib import Path\n"
            "sys.path[:] = [p for p in sys.path if not (Path(p) / 'easyeditor').is_dir()]\n"
            "try: host.find_host()\n"
            "except host.HostError as error: report(str(error))",
            tmp_path,
        )
        assert "git clone https://github.com/zjunlp/EasyEdit" in message and "EASYEDIT_HOME" in message
        assert "pip install --no-deps easyeditor==0.0.1.dev0" in message

    def test_describe_is_one_sentence(self):
        host = Host("main", Path("/there/easyeditor"), "main@14cea82", standins, found_by="through EASYEDIT_HOME")
        assert host.describe() == "EasyEdit main@14cea82 in /there/easyeditor, found through EASYEDIT_HOME."


# ---- loading ----

LOADED = """
import builtins, logging, os, random, warnings
import numpy as np, torch
from sphere_plugin.easyedit.host import find_host, load_host
from sphere_plugin.errors import HostError

warnings.simplefilter("error")
random.seed(1), np.random.seed(2), torch.manual_seed(3)
logging.getLogger().setLevel(logging.ERROR)
def world():
    root = logging.getLogger()
    return repr([
        random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(), torch.initial_seed(),
        root.level, root.handlers, sys.path, warnings.filters, builtins.__import__,
        os.environ.get("CUDA_LAUNCH_BLOCKING"),
    ])
before, found = world(), find_host()
host = load_host()
same = world() == before
stand_in = sys.modules["easyeditor.dataset.processor.blip_processors"].transforms
try:
    stand_in.Compose([])
    message = ""
except HostError as error:
    message = str(error)
import datasets, transformers
vision = ("torchvision", "timm", "fairscale", "av", "qwen_vl_utils", "iopath", "cv2")
report({
    "found": [found.kind, found.version, str(found.location)], "host": [host.kind, host.version, str(host.location)],
    "describe": host.describe(), "unchanged": same, "message": message, "again": load_host() == host,
    "methods": sorted(host.alg_dict), "editors": [host.base_editor.__name__, host.batch_editor.__name__],
    "torchvision": [transformers.utils.is_torchvision_available(), datasets.config.TORCHVISION_AVAILABLE],
    "visible": [name for name in sys.modules if name.partition(".")[0] in vision],
    "live": host.alg_dict is sys.modules["easyeditor.editors.editor"].ALG_DICT,
})
"""


@pytest.fixture(scope="module", params=HOSTS)
def loaded(request, tmp_path_factory):
    """What a process saw that loaded this host, with every warning an error."""
    return request.param, run(LOADED, tmp_path_factory.mktemp("loaded"), request.param)


needs_no_torchvision = pytest.mark.skipif(
    "torchvision" not in standins.missing_libraries(), reason="torchvision is installed: nothing stands in for it"
)


class TestLoading:
    def test_the_host_is_the_one_that_was_found(self, loaded):
        kind, seen = loaded
        assert seen["found"] == seen["host"] and seen["host"][0] == kind
        assert seen["host"][1].startswith("0.0.1.dev0" if kind == "pypi" else "main")
        assert "through EASYEDIT_HOME" in seen["describe"] if kind == "main" else "on sys.path" in seen["describe"]

    def test_its_tables_and_classes_are_the_live_ones(self, loaded):
        _, seen = loaded
        assert {"FT", "ROME", "MEMIT", "KN", "LoRA"} <= set(seen["methods"]) and seen["live"]
        assert seen["editors"] == ["BaseEditor", "BatchEditor"]

    def test_loading_twice_gives_the_same(self, loaded):
        assert loaded[1]["again"]

    def test_the_process_is_left_as_it_was(self, loaded):
        assert loaded[1]["unchanged"]

    @needs_no_torchvision
    def test_nobody_else_sees_the_stand_ins(self, loaded):
        assert loaded[1]["torchvision"] == [False, False]
        visible = {name.partition(".")[0] for name in loaded[1]["visible"]}
        assert not visible & set(standins.missing_libraries())

    @needs_no_torchvision
    def test_a_stand_in_says_what_is_missing_when_called(self, loaded):
        assert "torchvision is not installed; text editing does not need it, multimodal" in loaded[1]["message"]

    @needs_pypi
    def test_an_import_that_failed_before_is_started_afresh_and_an_installed_library_is_used(self, tmp_path):
        (tmp_path / "cv2.py").write_text("INTER_LINEAR = 1\n")
        kind, cv2 = run(
            "import types\nfrom sphere_plugin.easyedit.host import load_host\n"
            "sys.modules['easyeditor.dataset'] = types.ModuleType('easyeditor.dataset')\n"
            "report([load_host().kind, sys.modules['easyeditor.dataset.processor.randaugment'].cv2.__file__])",
            tmp_path,
        )
        assert kind == "pypi" and Path(cv2) == tmp_path / "cv2.py"


REFUSED = """
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.errors import HostError
{before}
try:
    load_host()
except HostError as error:
    report([str(error), "easyeditor" in sys.modules])
"""
AS_IT_IS = """
import importlib.util
sys.modules["easyeditor"] = importlib.util.module_from_spec(importlib.util.find_spec("easyeditor"))
"""


class TestRefusing:
    def test_a_missing_dependency_is_named(self, tmp_path):
        home = fake_checkout(tmp_path / "home", "import easyeditor\nimport no_such_library.inside\n")
        message, left_behind = run(REFUSED.format(before=""), tmp_path, home=str(home))
        assert "no module named no_such_library" in message and 'pip install "sphere-plugin[easyedit]"' in message
        assert not left_behind

    def test_a_name_that_a_library_no_longer_has_is_a_host_error(self, tmp_path):
        home = fake_checkout(tmp_path / "home", "from json import no_such_name\n")
        message, _ = run(REFUSED.format(before=""), tmp_path, home=str(home))
        assert "no_such_name" in message and "of a version that it cannot use" in message

    @needs_pypi
    def test_the_release_imported_unprepared(self, tmp_path):
        message, _ = run(REFUSED.format(before=AS_IT_IS), tmp_path)
        assert "call sphere_plugin.register() before anything imports easyeditor" in message

    @needs_pypi
    def test_another_one_imported_first(self, tmp_path):
        home = fake_checkout(tmp_path / "home")
        before = f"import os\nhome = os.environ.pop('EASYEDIT_HOME')\n{AS_IT_IS}os.environ['EASYEDIT_HOME'] = home\n"
        message, _ = run(REFUSED.format(before=before), tmp_path, home=str(home))
        assert str(_pypi_folder()) in message and str(home) in message and "unset EASYEDIT_HOME" in message


# ---- stand-ins ----


class TestStandIns:
    HOST_CODE = """
import no_such_vision.models.hub as hub
from no_such_vision import transforms
from no_such_vision.models.registry import register_model

class Flip(transforms.Flip):
    mode: "transforms.Mode" = transforms.Mode.BICUBIC

@register_model
def build(name=hub.DEFAULT):
    return name
"""

    @pytest.fixture
    def vision(self, monkeypatch):
        monkeypatch.setattr(standins, "missing_libraries", lambda: ("no_such_vision",))

    def test_host_code_can_import_subclass_and_decorate(self, vision):
        namespace: dict[str, Any] = {"__name__": "easyeditor.somewhere"}
        with standins.vision_stand_ins():
            exec(self.HOST_CODE, namespace)
        assert namespace["build"]("x") == "x"
        assert repr(namespace["hub"]) == "<stand-in for no_such_vision.models.hub>"
        for call in (namespace["Flip"], namespace["hub"].download, namespace["transforms"].Compose):
            with pytest.raises(HostError, match="no_such_vision is not installed; text editing does not need it"):
                call(3)

    def test_other_code_does_not_get_them(self, vision):
        with standins.vision_stand_ins(), pytest.raises(ModuleNotFoundError):
            exec("import no_such_vision", {"__name__": "transformers.image_utils"})

    def test_the_import_statement_is_put_back(self, vision):
        with pytest.raises(RuntimeError), standins.vision_stand_ins():
            raise RuntimeError
        with pytest.raises(ModuleNotFoundError):
            exec("import no_such_vision", {"__name__": "easyeditor.somewhere"})


# ---- preparing the release ----


class TestRules:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [(0, "cuda:0"), ("1", "cuda:1"), (2.0, "cuda:2"), ("cpu", "cpu"), ("mps", "mps"), ("cuda:1", "cuda:1")],
    )
    def test_a_device_means_what_it_means_in_main(self, given, expected):
        assert loader.torch_device(given) == expected
        assert loader.torch_device(torch.device("cpu")) == "cpu"

    @pytest.mark.parametrize("given", [None, "", True])
    def test_no_device_is_no_silent_cpu(self, given):
        with pytest.raises(ConfigError, match="device: got .*Write `device: cpu`"):
            loader.torch_device(given)

    def test_a_layer_may_return_a_tensor_or_a_tuple(self):
        hidden = torch.zeros(2, 3, 4)
        assert loader.hidden_state(hidden) is hidden and loader.hidden_state((hidden, None)) is hidden

    @pytest.mark.parametrize(
        ("rule", "old", "new"),
        [
            (loader.DeviceFromHparams, "x.to(f'cuda:{h.device}')", "x.to(_sphere_torch_device(h.device))"),
            (loader.DeviceOfSpreadModel, "h.device = str(m.device).split(':')[1]", "h.device = str(m.device)"),
            (loader.DeviceFromModel, "def f(model):\n    x.to('cuda')", "def f(model):\n    x.to(model.device)"),
            (loader.HiddenState, "cur_out[0][i, j] += d", "_sphere_hidden_state(cur_out)[i, j] += d"),
            (loader.HiddenState, "r = tr[k].output[0][:n]", "r = _sphere_hidden_state(tr[k].output)[:n]"),
            (
                loader.AnyLlamaTokenizer,
                "LlamaTokenizer.from_pretrained(n)",
                "AutoTokenizer.from_pretrained(n, padding_side='right')",
            ),
            (loader.AnyTokenizerPadsLeft, "isinstance(t, LlamaTokenizer)", "_sphere_is_tokenizer(t)"),
            (
                loader.WeightsInFloat32,
                "M.from_pretrained(n, device_map=None)",
                "M.from_pretrained(n, device_map=None, dtype=torch.float32)",
            ),
            (
                loader.UnknownTokenMayBeMissing,
                "mask = ids != tok.unk_token_id",
                "mask = ids != _sphere_token_id_or_none_such(tok.unk_token_id)",
            ),
        ],
    )
    def test_each_rule_changes_what_it_seeks(self, rule, old, new):
        change = rule()
        assert ast.unparse(change.visit(ast.parse(old))) == new and change.changes == 1

    @pytest.mark.parametrize(
        ("rule", "code"),
        [
            (loader.DeviceFromHparams, "f'cuda is {x}'"),
            (loader.HiddenState, "cur_out[0, i]"),
            (loader.DeviceFromModel, "def f(x):\n    x.to('cuda')"),
            (loader.WeightsInFloat32, "M.from_pretrained(n, torch_dtype=torch.float16, device_map=None)"),
        ],
    )
    def test_and_nothing_else(self, rule, code):
        change = rule()
        assert ast.unparse(change.visit(ast.parse(code))) == code and change.changes == 0

    def test_a_rule_that_finds_nothing_is_an_unknown_version(self):
        with pytest.raises(HostError, match=r"easyeditor\.util\.perplexity.*not from easyeditor 0\.0\.1\.dev0"):
            loader.prepare(ast.parse("pass"), "util.perplexity", "/site-packages/easyeditor/util/perplexity.py")

    def test_docstring_and_future_imports_stay_first(self):
        source = "'doc'\nfrom __future__ import annotations\ndef f(model): return x.to('cuda')"
        tree = loader.prepare(ast.parse(source), "util.perplexity", "perplexity.py")
        compile(tree, "perplexity.py", "exec")
        assert ast.get_docstring(tree) == "doc"

    @needs_pypi
    def test_every_rule_finds_its_place_in_the_release(self):
        folder = _pypi_folder()
        for _, modules in loader.RULES:
            for module in modules:
                path = folder.joinpath(*module.split(".")).with_suffix(".py")
                loader.prepare(ast.parse(path.read_bytes()), module, str(path))


# ---- editing ----

EDITS = """
import torch
from sphere_plugin.easyedit.host import load_host
from sphere_plugin.errors import HostError

host = load_host()
import easyeditor
folder = sys.argv[1]
layers = dict(
    layers=[1], rewrite_module_tmp="model.layers.{}.mlp.down_proj", layer_module_tmp="model.layers.{}",
    mlp_module_tmp="model.layers.{}.mlp", attn_module_tmp="model.layers.{}.self_attn", ln_f_module="model.norm",
    lm_head_module="lm_head", device="cpu", model_name=folder,
)
values = dict(
    fact_token="subject_last", v_num_grad_steps=4, v_lr=0.5, v_loss_layer=3, v_weight_decay=1e-3, kl_factor=0.0625,
    clamp_norm_factor=4, mom2_adjustment=False, mom2_dataset="wikipedia", mom2_n_samples=10, mom2_dtype="float32",
    stats_dir="stats",
)
steps = dict(num_steps=4, lr=1e-2, weight_decay=0, kl_factor=0, norm_constraint=False)
if host.kind == "main":
    steps |= dict(batch_size=1, objective_optimization="prompt_last")
methods = {
    "FT": easyeditor.FTHyperParams(alg_name="FT", **steps, **layers),
    "ROME": easyeditor.ROMEHyperParams(alg_name="ROME", context_template_length_params=[[5, 10]], **values, **layers),
    "MEMIT": easyeditor.MEMITHyperParams(
        alg_name="MEMIT", layer_selection="all", mom2_update_weight=10, **values, **layers
    ),
}
sys.modules["easyeditor.models.memit.memit_main"].get_cov = lambda *_, **__: torch.eye(64)
keep = {"sequential_edit": True} if host.kind == "main" else {"keep_original_weight": False}
seen = {}
for name, hparams in methods.items():
    editor = host.base_editor.from_hparams(hparams)
    before = {k: p.detach().clone() for k, p in editor.model.named_parameters()}
    torch.manual_seed(0)
    metrics, edited, _ = editor.edit(
        prompts=["The capital of France is"], target_new=["Rome"], ground_truth=["Paris"], subject=["France"],
        locality_inputs={"near": {"prompt": ["The Eiffel Tower is in"], "ground_truth": ["Paris"]}}, **keep,
    )
    change = {k: (p - before[k]) for k, p in edited.named_parameters() if not torch.equal(p, before[k])}
    torch.save(change, f"{name}.pt")
    seen[name] = {
        "changed": list(change), "finite": all(d.isfinite().all().item() for d in change.values()),
        "post": sorted(metrics[0]["post"]), "locality": sorted(metrics[0]["post"]["locality"]),
        "padding": editor.tok.padding_side, "dtype": str(next(edited.parameters()).dtype),
    }
if host.kind == "pypi":
    from easyeditor.trainer.blip2_models.blip2_opt import Blip2OPT
    try:
        Blip2OPT()
    except HostError as error:
        seen["blip2"] = str(error)
report(seen)
"""


def _files(folder: Path | None) -> dict[str, int]:
    paths = folder.rglob("*") if folder else []
    return {str(path): path.stat().st_mtime_ns for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A function from a host's kind to what its edits did and the folder of their updates; each host runs once."""
    done: dict[str, tuple[Any, Path]] = {}
    model = save_pico("llama", tmp_path_factory.mktemp("models") / "pico-llama")

    def edits_of(kind: str) -> tuple[Any, Path]:
        if kind not in done:
            folder, before = tmp_path_factory.mktemp(kind), _files(_pypi_folder())
            seen = run(EDITS, folder, kind, str(model))
            done[kind] = {**seen, "files unchanged": _files(_pypi_folder()) == before}, folder
        return done[kind]

    return edits_of


class TestEditing:
    @pytest.mark.parametrize("kind", HOSTS)
    @pytest.mark.parametrize("method", ["FT", "ROME", "MEMIT"])
    def test_an_edit_changes_its_weight_and_is_measured(self, kind, method, edited):
        seen = edited(kind)[0][method]
        assert seen["changed"] == ["model.layers.1.mlp.down_proj.weight"] and seen["finite"]
        assert {"rewrite_acc", "locality"} <= set(seen["post"]) and "near_acc" in seen["locality"]
        assert seen["padding"] == ("left" if method == "FT" else "right")
        assert seen["dtype"] == "torch.float32"

    @needs_pypi
    @needs_main
    @pytest.mark.parametrize("method", ["ROME", "MEMIT"])
    def test_the_prepared_release_computes_what_main_computes(self, method, edited):
        (update,), (reference,) = (torch.load(edited(k)[1] / f"{method}.pt").values() for k in ("pypi", "main"))
        assert torch.allclose(update, reference, rtol=1e-4, atol=1e-6 * float(reference.abs().max()))

    @needs_pypi
    def test_the_installed_files_stay_as_they_are_and_no_bytecode_is_written(self, edited):
        assert edited("pypi")[0]["files unchanged"]

    @needs_pypi
    def test_its_multimodal_models_say_why_they_are_gone(self, edited):
        assert "Use a checkout of EasyEdit" in edited("pypi")[0]["blip2"]
