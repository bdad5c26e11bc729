"""Run an EasyEdit script as it is, with the plugin active, from any working directory."""

from __future__ import annotations

import dataclasses
import functools
import logging
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, Final

from sphere_plugin.easyedit.host import HOME_VARIABLE, Host, find_host
from sphere_plugin.easyedit.hparams import SphereHyperParams
from sphere_plugin.easyedit.patches import Patches
from sphere_plugin.easyedit.registration import register, unregister
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.errors import ConfigError, HostError
from sphere_plugin.paths import user_path

EXAMPLES: Final = "examples"
SEED: Final = 42  # what EasyEdit main seeds all generators with as it is imported

_LOG = logging.getLogger("sphere_plugin")
_NONE: Final = MappingProxyType[str, object]({})


def launch(script: str | Path, arguments: Sequence[str] = (), overrides: Mapping[str, object] = _NONE) -> None:
    """Run ``script`` as ``python script arguments`` would, while the plugin is registered; then take all of it back.

    Args:
        script: a file; a relative path is looked up in the working directory, then in EasyEdit's examples folder.
        arguments: the script's own, ``sys.argv[1:]`` to it.
        overrides: keys that all hyper-parameters get, whatever their YAML says; see ``register``.

    Raises:
        ConfigError: there is no such script.
        HostError: there is no EasyEdit, or it cannot be loaded.
        BaseException: whatever the script raises, SystemExit among it.
    """
    path = find_script(script)
    with ExitStack() as stack:
        stack.enter_context(_as_python_would(path, arguments))
        stack.callback(unregister)
        host = register(overrides=overrides)
        patches = Patches()
        stack.callback(patches.undo)
        _read_either_sphere_yaml(patches, overrides.get("sphere"))
        _count_words_without_punkt(patches)
        _return_scores_only(patches, host)
        _seed_as_imported(host)
        runpy.run_path(str(path), run_name="__main__")


def find_script(script: str | Path) -> Path:
    """Return the script's absolute path; nothing is imported to find it.

    Raises:
        ConfigError: there is no such file.
    """
    given = user_path(script)
    examples = None if given.is_absolute() else _examples()
    for folder in (Path(), examples):
        if folder is not None and (folder / given).is_file():
            return (folder / given).resolve()
    expected = "a file" if examples is None else f"a file, here or in {examples}"
    remedy = f"Check the path. With {HOME_VARIABLE} set, scripts in EasyEdit's {EXAMPLES} folder are found by name."
    raise ConfigError("script", str(script), expected, remedy)


def _examples() -> Path | None:
    """The folder of example scripts of the EasyEdit that is there; the PyPI release has none."""
    try:
        host = find_host()
    except HostError:
        return None
    return host.location.parent / EXAMPLES if host.kind == "main" else None


@contextmanager
def _as_python_would(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Set what a script sees of its process: ``sys.argv``, ``sys.path``, and logging as EasyEdit sets it up.

    A script in EasyEdit's examples folder counts on its checkout as well: it appends ".." to the path, which is the
    checkout only where the script's folder is the working directory.
    """
    argv, path = sys.argv, list(sys.path)
    loggers = {name: logging.getLogger(name) for name in (PACKAGE, _LOG.name)}
    levels = {name: logger.level for name, logger in loggers.items()}
    checkout = [str(folder) for folder in script.parents[1:2] if (folder / PACKAGE / "__init__.py").is_file()]
    sys.argv = [str(script), *arguments]
    sys.path[:0] = [str(script.parent), *checkout]
    for logger in loggers.values():
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        for name, level in levels.items():
            loggers[name].setLevel(level)


# ---- what the scripts trip over ----


def _read_either_sphere_yaml(patches: Patches, override: object) -> None:
    """Scripts read SPHERE's YAML with EasyEdit's class, which refuses ours; our class reads both."""
    module = sys.modules.get(f"{PACKAGE}.models.SPHERE.SPHERE_hparams")
    if module is None:  # the PyPI release
        return

    def from_hparams(cls: type, hparams_name_or_path: str | Path) -> SphereHyperParams:
        settings = SphereHyperParams.from_hparams(hparams_name_or_path)
        return dataclasses.replace(settings, **override) if isinstance(override, Mapping) else settings

    patches.attribute(module.SPHEREHyperParams, "from_hparams", classmethod(from_hparams))


def _count_words_without_punkt(patches: Patches) -> None:
    """Let EasyEdit's n-gram entropy do without nltk's punkt data, which pip cannot install, where it is missing."""
    evaluation = sys.modules[f"{PACKAGE}.evaluate.evaluate_utils"]
    nltk: ModuleType = evaluation.nltk
    try:
        nltk.word_tokenize("One. Two.")
    except LookupError:
        without = SimpleNamespace(**{**vars(nltk), "word_tokenize": _words_of_one_line(nltk.word_tokenize)})
        patches.item(vars(evaluation), "nltk", without)


def _words_of_one_line(word_tokenize: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """nltk's own word_tokenize, on a text that is taken for one sentence; the log says so at the first text."""
    told: list[bool] = []  # lives as long as one launch

    def words(text: str, *_: Any, **__: Any) -> list[str]:
        if not told:
            told.append(True)
            _LOG.warning(
                "nltk's punkt data is missing: EasyEdit's fluency (n-gram entropy) is computed without splitting "
                "texts into sentences, so that a full stop inside a text stays with its word"
            )
        return word_tokenize(text, preserve_line=True)

    return words


def _return_scores_only(patches: Patches, host: Host) -> None:
    """Take raw answers to locality prompts out of what editors return, once they are scored.

    Main leaves them beside their scores; run_knowedit_llama2.py and others average whatever is there, which fails with
    a TypeError, with or without the plugin. The file logs/results.json keeps them.
    """
    for name in ("edit", "batch_edit"):
        patches.attribute(host.base_editor, name, _without_answers(vars(host.base_editor)[name]))


def _without_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        returned = original(*args, **kwargs)
        for metrics in returned[0]:
            locality = metrics.get("post", {}).get("locality", {})
            for scored in [key.removesuffix("_acc") for key in locality if key.endswith("_acc")]:
                locality.pop(f"{scored}_output", None)
        return returned

    return call


def _seed_as_imported(host: Host) -> None:
    """Seed all generators as importing main does: ``load_host`` takes that back, and scripts draw records by it."""
    seed_everything = getattr(sys.modules[host.base_editor.__module__], "seed_everything", None)
    if seed_everything is not None:
        seed_everything(SEED)
