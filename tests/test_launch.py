"""`sphere launch`: unmodified scripts with the plugin active, on the host that is found."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pico import save_pico

import sphere_plugin as sp
from sphere_plugin import ConfigError, HostError
from sphere_plugin.cli import main
from sphere_plugin.easyedit import launch as launching
from sphere_plugin.easyedit.host import Host, find_host, load_host
from sphere_plugin.easyedit.method import SphereMethod

try:
    KIND = find_host().kind
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

only_on_main = pytest.mark.skipif(KIND != "main", reason="EASYEDIT_HOME is not set: the PyPI release has no examples")
ROOT = Path(__file__).resolve().parent.parent
EVALUATION = "easyeditor.evaluate.evaluate_utils"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """The host, with nothing of ours in it before; a launch has to leave it like that."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    host = load_host()
    sp.unregister()
    log = sys.modules["easyeditor.editors.editor"].LOG
    handlers = list(log.handlers)
    before = state(host)
    yield host
    assert all(one is other for one, other in zip(state(host), before, strict=True))
    for handler in [handler for handler in log.handlers if handler not in handlers]:
        log.removeHandler(handler)
        handler.close()


def state(host: Host) -> list[Any]:
    """What a launch changes and has to put back, as the very objects."""
    own = sys.modules.get("easyeditor.models.SPHERE.SPHERE_hparams")
    return [
        *host.alg_dict.values(),
        *(vars(host.base_editor)[name] for name in ("__init__", "edit", "batch_edit")),
        sys.modules[EVALUATION].nltk,
        vars(own.SPHEREHyperParams)["from_hparams"] if own else None,
        sys.argv,
        *sys.path,
        sys.modules["__main__"],
        *(logging.getLogger(name).level for name in ("easyeditor", "sphere_plugin")),
    ]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """script(source) -> a file in a folder that is not the working directory."""

    def write(source: str, name: str = "script.py") -> Path:
        path = tmp_path / "scripts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        return path

    return write


SEEN = """
import json, os, sys
import easyeditor, beside
from easyeditor import BaseEditor
table = sys.modules["easyeditor.util.alg_dict"].ALG_DICT
json.dump({
    "name": __name__, "file": __file__, "argv": sys.argv, "folder": sys.path[0], "here": os.getcwd(),
    "host": easyeditor.__file__, "sphere": type(table["SPHERE"]).__name__, "beside": beside.__file__,
    "main": sys.modules["__main__"].__file__,
}, open("seen.json", "w"))
"""


# ---- what a script sees ----


def test_a_script_sees_what_python_would_show_it(host: Host, script: Callable, tmp_path: Path) -> None:
    script("", "beside.py")
    path = script(SEEN)
    for again in ("1", "2"):
        assert main(["launch", str(path), "--number", again]) == 0
        seen = json.loads((tmp_path / "work" / "seen.json").read_text())
        assert seen == {
            "name": "__main__",
            "file": str(path),
            "main": str(path),
            "argv": [str(path), "--number", again],
            "folder": str(path.parent),
            "beside": str(path.with_name("beside.py")),
            "here": str(tmp_path / "work"),
            "host": str(host.location / "__init__.py"),
            "sphere": SphereMethod.__name__,
        }
    assert not isinstance(host.alg_dict.get("SPHERE"), SphereMethod)


def test_everything_after_the_script_is_the_scripts(script: Callable) -> None:
    path = script("import sys; open('argv', 'w').write(repr(sys.argv[1:]))")
    arguments = ["--sphere", "--eta", "7", "--", "-h", "--help", "--version", "launch", ""]
    assert main(["launch", "--alpha", "0.5", str(path), *arguments]) == 0
    assert Path("argv").read_text() == repr(arguments)


@pytest.mark.parametrize(("ending", "code"), [("", None), ("3", 3), ("'no data'", "no data"), ("0", 0)])
def test_the_exit_code_is_the_scripts(ending: str, code: object, script: Callable) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["launch", str(script(f"import sys; sys.exit({ending})"))])
    assert caught.value.code == code


def test_an_error_in_the_script_keeps_its_traceback(script: Callable) -> None:
    path = script("def divide():\n    return 1 / 0\n\ndivide()\n")
    with pytest.raises(ZeroDivisionError) as caught:
        main(["launch", str(path)])
    assert [(str(entry.path), entry.lineno + 1) for entry in caught.traceback[-2:]] == [(str(path), 4), (str(path), 2)]


def test_our_own_error_in_the_script_is_one_sentence(script: Callable, capsys: pytest.CaptureFixture) -> None:
    path = script("import sphere_plugin\nsphere_plugin.SphereConfig(eta=2)\n")
    assert main(["launch", str(path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sphere: eta: got 2") and said.err.count("\n") == 1


HANDLERS = """
import logging
loud, filed = logging.getLogger("loud"), logging.getLogger("filed")
loud.addHandler(logging.StreamHandler())
loud.addHandler(logging.FileHandler("loud.log"))
filed.addHandler(logging.FileHandler("filed.log"))
for name in ("loud", "loud.child", "filed", "silent"):
    logging.getLogger(name).warning("from %s", name)
"""


def test_a_warning_is_shown_once(script: Callable, tmp_path: Path) -> None:
    """EasyEdit's loggers, and those of Hugging Face, have a handler of their own and hand on what it has shown."""
    path = script(HANDLERS)
    done = subprocess.run(
        [sys.executable, "-m", "sphere_plugin", "launch", str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^.*\bfrom (?:loud|filed|silent).*$", done.stderr, re.MULTILINE)
    assert told == ["from loud", "from loud.child", "WARNING: from filed", "WARNING: from silent"]


# ---- which script, and what is refused ----


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        pytest.fail("the host was loaded before the mistake was reported")

    monkeypatch.setattr(launching, "register", reached)


@pytest.mark.parametrize("missing", ["nothing.py", "/nowhere/nothing.py", "~/nowhere/nothing.py", ".", ""])
def test_a_missing_script_is_told_before_anything_is_loaded(
    missing: str, nothing_loaded: None, capsys: pytest.CaptureFixture
) -> None:
    assert main(["launch", missing]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"sphere: script: got {missing!r}, expected a file")
    assert ("examples" in said.partition("expected")[2].partition(". ")[0]) == (
        KIND == "main" and not missing.startswith(("/", "~"))
    )


@pytest.mark.parametrize(
    ("option", "value"), [("--eta", "0"), ("--eta", "1.5"), ("--alpha", "-0.1"), ("--alpha", "nan")]
)
def test_a_number_out_of_its_range_is_told_before_anything_is_loaded(
    option: str, value: str, nothing_loaded: None, script: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert main(["launch", f"{option}={value}", str(script(""))]) == 1
    assert capsys.readouterr().err.startswith(f"sphere: {option[2:]}: got ")


def test_scripts_are_found_here_first_then_among_easyedits_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("checkout/easyeditor", "checkout/examples", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "checkout" / "easyeditor" / "__init__.py").touch()
    example = tmp_path / "checkout" / "examples" / "one.py"
    example.touch()
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "checkout"))
    assert launching.find_script("one.py") == example
    Path("one.py").touch()
    assert launching.find_script("one.py") == tmp_path / "work" / "one.py"
    (tmp_path / "scripts" / "one.py").touch()
    assert launching.find_script("../scripts/one.py") == tmp_path / "scripts" / "one.py"
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "nowhere"))
    assert launching.find_script(Path("one.py")) == tmp_path / "work" / "one.py"
    with pytest.raises(ConfigError, match="script: got 'two.py', expected a file"):
        launching.find_script("two.py")


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ([], {}),
        (["--sphere"], {"sphere": True}),
        (["--eta", "0.4"], {"sphere": {"eta": 0.4}}),
        (["--alpha", "0.9"], {"sphere": {"alpha": 0.9}}),
        (["--sphere", "--eta", "0.4", "--alpha", "0.9"], {"sphere": {"eta": 0.4, "alpha": 0.9}}),
    ],
)
def test_the_options_become_keys_of_every_yaml(
    options: list[str], overrides: dict, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    register = launching.register

    def recording(overrides: object) -> Host:
        given.append(overrides)
        return register(overrides)

    monkeypatch.setattr(launching, "register", recording)
    assert main(["launch", *options, str(script(""))]) == 0
    assert given == [overrides]


# ---- what scripts trip over ----

COUNTING = f"""
import sys
tokenize = sys.modules["{EVALUATION}"].compute_n_gram_entropy
print(*(tokenize(text) > 0 for text in ("One here. Two there. Two there.", "And a third one.")))
"""


def test_fluency_is_counted_without_punkt_and_the_log_says_how(
    script: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    nltk = sys.modules[EVALUATION].nltk
    calls: list[bool] = []

    def word_tokenize(text: str, language: str = "english", preserve_line: bool = False) -> list[str]:
        calls.append(preserve_line)
        if not preserve_line:
            raise LookupError("Resource punkt_tab not found.")
        return text.split()

    monkeypatch.setattr(nltk, "word_tokenize", word_tokenize)
    assert main(["launch", str(script(COUNTING))]) == 0
    assert capsys.readouterr().out == "True True\n"
    assert calls[0] is False and set(calls[1:]) == {True}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.name == "sphere_plugin" and "punkt data is missing" in warning.getMessage()
    caplog.clear()
    assert main(["launch", str(script("pass"))]) == 0
    assert not [record for record in caplog.records if record.levelno == logging.WARNING], "nothing was counted"


def test_where_punkt_is_there_nothing_is_replaced(
    script: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nltk = sys.modules[EVALUATION].nltk
    monkeypatch.setattr(nltk, "word_tokenize", lambda text, **_: text.split())
    source = f"import nltk, sys; assert sys.modules['{EVALUATION}'].nltk is nltk"
    assert main(["launch", str(script(source + COUNTING))]) == 0
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@only_on_main
def test_a_script_draws_the_records_it_draws_without_us(script: Callable, capsys: pytest.CaptureFixture) -> None:
    """EasyEdit seeds everything as it is imported; run_zsre_llama2.py samples its records after that."""
    source = (
        "import easyeditor, random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())"
    )
    path = script(source)
    for _ in range(2):
        assert main(["launch", str(path)]) == 0
    one, other = capsys.readouterr().out.splitlines()
    plain = "import numpy, random, torch\nfor seed in (random.seed, numpy.random.seed, torch.manual_seed): seed(42)\n"
    exec(plain + source.partition("\n")[2])
    assert one == other == capsys.readouterr().out.strip()


# ---- editing ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model in a folder of a name that EasyEdit loads by."""
    return save_pico("llama", tmp_path_factory.mktemp("models") / "llama")


def shipped(method: str, **changes: object) -> dict[str, Any]:
    """The keys of our own YAML for the embedded model."""
    return {**yaml.safe_load((ROOT / "hparams" / method / "smollm2-135m.yaml").read_text()), **changes}


def small(method: str, folder: Path, **changes: object) -> dict[str, Any]:
    """The same for a pico model."""
    settings = shipped(method, model_name=str(folder), layers=[1], **changes)
    fewer = {"num_steps": 3, "v_num_grad_steps": 3, "v_loss_layer": 3, "context_template_length_params": [[5, 2]]}
    return {**settings, **{key: value for key, value in fewer.items() if key in settings}}


EDITING = """
import sys
from easyeditor import BaseEditor, FTHyperParams
editor = BaseEditor.from_hparams(FTHyperParams.from_hparams(sys.argv[1]))
metrics, model, _ = editor.edit(
    prompts=["The Eiffel Tower is in the city of"], target_new=["Rome"], ground_truth=["Paris"],
    subject=["Eiffel Tower"], locality_inputs={"near": {"prompt": ["Toyota is in"], "ground_truth": ["Japan"]}},
)
print("POST", *sorted(metrics[0]["post"]["locality"]))
"""


@pytest.mark.parametrize("options", [[], ["--sphere"], ["--eta=0.9", "--alpha=0.25"]], ids=str)
def test_a_script_edits_with_and_without_sphere(
    options: list[str],
    script: Callable,
    model: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    settings = small("FT", model)
    if KIND == "pypi":
        del settings["objective_optimization"]
    Path("ft.yaml").write_text(yaml.safe_dump(settings))
    sp.unregister()  # other tests of this process may have registered, or raised the level
    caplog.set_level(logging.INFO, "sphere_plugin")
    assert main(["launch", *options, str(script(EDITING)), "ft.yaml"]) == 0
    assert "POST near_acc\n" in capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records if record.name == "sphere_plugin"]
    assert any("SPHERE is registered" in line for line in said)
    assert bool(options) == any(line.startswith("FT + SPHERE changed 1 weight") for line in said)


# ---- EasyEdit's own scripts, on real records ----


def records(folder: Path, name: str) -> list[str]:
    """A script's own arguments: where its records are, and how many to take."""
    options = {
        "run_SPHERE_editing.py": [str(folder), "--data_type", "CF"],
        "run_AlphaEdit_editing.py": [str(folder), "--data_type", "ZsRE"],
        "run_knowedit_llama2.py": [
            str(folder / "knowedit" / "wiki_counterfact_train_cf.json"),
            *("--datatype", "counterfact", "--metrics_save_dir", "outputs"),
        ],
        "run_zsre_llama2.py": [str(folder), "--metrics_save_dir", "."],
        "run_wise_editing.py": ["data", "--data_type", "ZsRE"],
    }
    if name == "run_wise_editing.py":  # its data set names the two files otherwise
        place = Path("data") / "ZsRE"
        place.mkdir(parents=True)
        (place / "zsre_mend_edit.json").symlink_to(folder / "zsre_mend_eval.json")
        (place / "zsre_mend_train.json").symlink_to(folder / "zsre_mend_train.json")
    return ["--data_dir", *options[name], "--ds_size", "1"]


def results(name: str) -> list[dict[str, Any]]:
    """The metrics that a script wrote."""
    folder = Path() if name == "run_zsre_llama2.py" else Path("outputs")
    (file,) = [*folder.glob("*_results.json"), *folder.glob("*_N=1_*.json")]
    written: list[dict[str, Any]] = json.loads(file.read_text())
    return written


SCRIPTS = (
    "run_SPHERE_editing.py",
    "run_AlphaEdit_editing.py",
    "run_knowedit_llama2.py",
    "run_zsre_llama2.py",
    "run_wise_editing.py",
)


@only_on_main
@pytest.mark.parametrize("name", SCRIPTS)
def test_easyedits_scripts_run_on_a_pico_model(
    name: str, model: Path, shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("ft.yaml").write_text(yaml.safe_dump(small("FT", model)))
    options = ["--editing_method", "FT", "--hparams_dir", "ft.yaml", *records(shared_data, name)]
    assert main(["launch", "--sphere", name, *options]) == 0
    (metrics,) = results(name)
    assert {"rewrite_acc", "locality"} <= metrics["post"].keys()
    assert all(key.endswith("_acc") for key in metrics["post"]["locality"])
    said = [record.getMessage() for record in caplog.records if record.name == "sphere_plugin"]
    assert [line for line in said if line.startswith("FT + SPHERE")]


def easyedits(method: str, **changes: object) -> dict[str, Any]:
    """A YAML of EasyEdit's own, its paths and device aside."""
    name = "llama3-8b" if method == "SPHERE" else "llama-7b"
    settings = yaml.safe_load((find_host().location.parent / "hparams" / method / f"{name}.yaml").read_text())
    return {**settings, "device": "cpu", **changes}


@only_on_main
def test_easyedits_sphere_yaml_and_ours_are_both_read(model: Path, script: Callable, tmp_path: Path) -> None:
    Path("host.yaml").write_text(yaml.safe_dump(easyedits("SPHERE", model_name=str(model))))
    source = """
import sys
from easyeditor import SPHEREHyperParams
read = SPHEREHyperParams.from_hparams(sys.argv[1])
open("read", "w").write(f"{read.model_name} {read.eta} {read.alpha} {read.layers}")
"""
    ours = str(ROOT / "hparams" / "SPHERE" / "smollm2-135m")
    path = str(script(source))
    for options, given, expected in [
        ([], "host.yaml", f"{model} 0.5 0.5 [4, 5, 6, 7, 8]"),
        ([], "host", f"{model} 0.5 0.5 [4, 5, 6, 7, 8]"),
        (["--alpha", "0.9"], "host.yaml", f"{model} 0.5 0.9 [4, 5, 6, 7, 8]"),
        ([], ours, "smollm2-135m 0.5 0.5 [12, 13, 14, 15, 16]"),
        (["--sphere"], ours, "smollm2-135m 0.5 0.5 [12, 13, 14, 15, 16]"),
        (["--eta", "0.4", "--alpha", "0.9"], ours, "smollm2-135m 0.4 0.9 [12, 13, 14, 15, 16]"),
    ]:
        assert main(["launch", *options, path, given]) == 0
        assert Path("read").read_text() == expected


@only_on_main
def test_a_method_without_a_weight_update_is_refused_with_sphere(
    shared_data: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("wise.yaml").write_text(yaml.safe_dump(easyedits("WISE", model_name=str(model))))
    options = ["--editing_method", "WISE", "--hparams_dir", "wise.yaml", *records(shared_data, "run_wise_editing.py")]
    assert main(["launch", "--sphere", "run_wise_editing.py", *options]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sphere: SPHERE on WISE: got 'no weight update to project")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sphere launch` in a process of its own, called from the working directory of the test."""
    return subprocess.run(
        [sys.executable, "-m", "sphere_plugin", "launch", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@only_on_main
def test_a_script_in_a_checkout_runs_on_that_checkout() -> None:
    checkout = find_host().location.parent
    done = command(str(checkout / "examples" / "run_SPHERE_editing.py"), "--help", EASYEDIT_HOME="")
    assert done.returncode == 0 and "--sequential_edit" in done.stdout
    assert "INFO: SPHERE is registered in place of EasyEdit's own, until unregister(): EasyEdit main" in done.stderr


CASES = {
    "SPHERE": (["--eta", "0.4"], "run_SPHERE_editing.py", "SPHERE", {}),
    "SPHERE, EasyEdit's YAML": (
        [],
        "run_SPHERE_editing.py",
        "SPHERE",
        {
            "model_name": "smollm2-135m",
            "layers": [12, 13, 14, 15, 16],
            "v_loss_layer": 29,
            "v_num_grad_steps": 10,
            "v_lr": 1.0,
            "mom2_dataset": "generated",
            "mom2_n_samples": 40,  # counted anew: its stats_dir is in the working directory
        },
    ),
    "ROME": (["--sphere"], "run_SPHERE_editing.py", "ROME", {}),
    "FT, AlphaEdit's script": (["--sphere"], "run_AlphaEdit_editing.py", "FT", {}),
    "FT, KnowEdit": (["--sphere"], "run_knowedit_llama2.py", "FT", {}),
    "FT, ZsRE": ([], "run_zsre_llama2.py", "FT", {}),
    "FT, WISE's script": (["--alpha", "0.5"], "run_wise_editing.py", "FT", {}),
}


@only_on_main
@pytest.mark.slow
@pytest.mark.keeps_cache
@pytest.mark.parametrize("case", CASES)
def test_easyedits_scripts_run_on_the_embedded_model(case: str, shared_data: Path) -> None:
    options, name, method, changes = CASES[case]
    settings = easyedits(method, **changes) if changes else shipped(method)
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    given = ["--editing_method", method, "--hparams_dir", "settings.yaml", *records(shared_data, name)]
    done = command(*options, name, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = results(name)
    before, after = (metrics[when]["rewrite_acc"][0] for when in ("pre", "post"))
    assert after > before
    projected = re.search(r"INFO: .*\+ SPHERE .* of the update removed", done.stderr)  # beside a progress bar
    assert bool(projected) == bool(options or method == "SPHERE")
