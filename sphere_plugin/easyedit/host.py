"""Which EasyEdit is there, and how to load it without its side effects.

Two hosts are known: a git checkout of zjunlp/EasyEdit ("main"), found through the environment variable EASYEDIT_HOME
or on `sys.path`, and the PyPI release easyeditor 0.0.1.dev0 ("pypi"). `find_host` looks without importing anything;
`load_host` imports. Neither keeps a record of its own: what is loaded stands in `sys.modules`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

from sphere_plugin.easyedit.loader import PreparedLoader, PreparingFinder
from sphere_plugin.easyedit.standins import PACKAGE, vision_stand_ins
from sphere_plugin.errors import HostError
from sphere_plugin.paths import user_path
from sphere_plugin.process import ONE_AT_A_TIME
from sphere_plugin.randomness import randomness_kept

HOME_VARIABLE: Final = "EASYEDIT_HOME"
GET_A_HOST: Final = (
    f"Either `git clone https://github.com/zjunlp/EasyEdit` and set {HOME_VARIABLE} to that folder, "
    "or `pip install --no-deps easyeditor==0.0.1.dev0`."
)

log = logging.getLogger("sphere_plugin")


@dataclass(frozen=True)
class HostLocation:
    """An EasyEdit that was found, imported or not."""

    kind: Literal["main", "pypi"]
    location: Path  # the folder of the package `easyeditor`
    version: str
    found_by: str = field(default="already imported", compare=False, kw_only=True)

    def describe(self) -> str:
        """One sentence: which host, which version, where, and how it was found."""
        name = "EasyEdit" if self.kind == "main" else "the PyPI release easyeditor"
        return f"{name} {self.version} in {self.location}, found {self.found_by}."


@dataclass(frozen=True)
class Host(HostLocation):
    """An EasyEdit that is loaded."""

    package: ModuleType

    @property
    def alg_dict(self) -> dict[str, Callable[..., Any]]:
        """The live table from method names to their functions: shared by all editors, so change it in place."""
        # Not `import easyeditor.util.alg_dict`: `import *` puts another `util` in its way.
        methods: dict[str, Callable[..., Any]] = sys.modules[f"{PACKAGE}.util.alg_dict"].ALG_DICT
        return methods

    @property
    def base_editor(self) -> type:
        """The class `BaseEditor`."""
        editor: type = sys.modules[f"{PACKAGE}.editors.editor"].BaseEditor
        return editor

    @property
    def batch_editor(self) -> type:
        """The class `BatchEditor`, which decides what may be edited in batches."""
        editor: type = sys.modules[f"{PACKAGE}.editors.batch_editor"].BatchEditor
        return editor


# ---- finding ----


def find_host() -> HostLocation:
    """Find EasyEdit without importing it: EASYEDIT_HOME, then what is imported already, then `sys.path`.

    Raises:
        HostError: EASYEDIT_HOME is set and wrong, or there is no EasyEdit at all.
    """
    home = os.environ.get(HOME_VARIABLE, "")
    if home:
        return _located(_package_of(home), f"through {HOME_VARIABLE}")
    if PACKAGE in sys.modules:
        return _located(_folder_of(sys.modules[PACKAGE]), HostLocation.found_by)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:  # a folder of that name without an __init__.py has no origin
        raise HostError("EasyEdit", "nothing", f"{HOME_VARIABLE} or an importable `{PACKAGE}`", GET_A_HOST)
    return _located(Path(spec.origin).parent, "on sys.path")


def _package_of(home: str) -> Path:
    folder = user_path(home).resolve() / PACKAGE
    if not (folder / "__init__.py").is_file():
        remedy = f"Set {HOME_VARIABLE} to the folder that `git clone https://github.com/zjunlp/EasyEdit` makes."
        raise HostError(HOME_VARIABLE, home, f"a folder with {PACKAGE}/__init__.py in it", remedy)
    return folder


def _folder_of(package: ModuleType) -> Path:
    origin = getattr(package, "__file__", None)
    if origin is None:
        remedy = f"Start a new Python process and call sphere_plugin.register() first. {GET_A_HOST}"
        raise HostError(f"sys.modules[{PACKAGE!r}]", package, "a package with a file", remedy)
    return Path(origin).resolve().parent


def _located(folder: Path, found_by: str) -> HostLocation:
    """Tell the release from a checkout: pip leaves the metadata of a distribution beside the package, git does not."""
    folder = folder.resolve()
    for distribution in importlib.metadata.distributions(name=PACKAGE, path=[str(folder.parent)]):
        return HostLocation("pypi", folder, distribution.version, found_by=found_by)
    return HostLocation("main", folder, _git_version(folder.parent), found_by=found_by)


def _git_version(checkout: Path) -> str:
    """Return "main@<short commit>" from git's files: there may be no git to run, and a copy may have lost its .git."""
    try:
        git = checkout / ".git"
        if git.is_file():  # a worktree or a submodule: "gitdir: <folder>"
            git = checkout / git.read_text().partition(":")[2].strip()
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        commit = head if name == head else _commit_of(name, git)
    except OSError:
        return "main"
    return f"main@{commit[:7]}" if commit else "main"


def _commit_of(ref: str, git: Path) -> str:
    """The commit of a branch: git keeps it in a file of its own, or with others in packed-refs."""
    if (git / "commondir").is_file():  # a worktree keeps its branches with the main one
        git = git / (git / "commondir").read_text().strip()
    if (git / ref).is_file():
        return (git / ref).read_text().strip()
    for line in (git / "packed-refs").read_text().splitlines():
        if line.endswith(f" {ref}"):
            return line.split()[0]
    return ""


# ---- loading ----


def load_host() -> Host:
    """Find EasyEdit and import it, once; later calls return the same package.

    Its import reseeds the random generators, configures the root logger and slows down GPU launches. All of that is
    put back, so that loading it changes no result of the program around it.

    Raises:
        HostError: no EasyEdit, a dependency of it is missing, or the process has already imported another one.
    """
    with ONE_AT_A_TIME:
        found = find_host()
        package = sys.modules.get(PACKAGE)
        if package is None:
            package = _import_host(found)
            log.info("Loaded %s", found.describe())
        _check_same(package, found)
    return Host(found.kind, found.location, found.version, package, found_by=found.found_by)


def _check_same(package: ModuleType, found: HostLocation) -> None:
    """A process holds one `easyeditor`. If the user imported it first, it must be the right one, and usable."""
    loaded_from = _folder_of(package)
    if loaded_from != found.location:
        remedy = f"Import {PACKAGE} from {found.location}, or unset {HOME_VARIABLE}, in a new Python process."
        raise HostError(f"the imported {PACKAGE}", str(loaded_from), str(found.location), remedy)
    loader = package.__spec__.loader if package.__spec__ else None
    if found.kind == "pypi" and not isinstance(loader, PreparedLoader):
        remedy = f"In a new Python process, call sphere_plugin.register() before anything imports {PACKAGE}."
        raise HostError(f"the imported {PACKAGE}", "the PyPI release as it is", "it prepared on import", remedy)


def _import_host(found: HostLocation) -> ModuleType:
    _forget_host()  # an import that failed halfway leaves its submodules behind
    finder = PreparingFinder(found.location)
    if found.kind == "pypi":
        sys.meta_path.insert(0, finder)
    try:
        with _contained(), vision_stand_ins() as missing:
            log.debug("Stand-ins while EasyEdit is imported: %s", ", ".join(missing) or "none")
            return _import_from(found.location.parent, finder if found.kind == "pypi" else PathFinder())
    except BaseException as error:
        _forget_host()
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        if isinstance(error, ImportError) and not isinstance(error, HostError):
            raise _import_failed(found, error) from error
        raise


def _import_from(folder: Path, finder: PathFinder | PreparingFinder) -> ModuleType:
    """Import the one package in this folder, not the first of that name on `sys.path`, which stays as it is."""
    spec = finder.find_spec(PACKAGE, [str(folder)])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no package {PACKAGE} in {folder}", name=PACKAGE)
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    return package


def _import_failed(found: HostLocation, error: ImportError) -> HostError:
    culprit = f"the import of {found.describe().rstrip('.')}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(PACKAGE):
        remedy = f'Its dependencies come with `pip install "sphere-plugin[easyedit]"`; {error.name} is missing.'
        return HostError(culprit, f"no module named {error.name}", "its dependencies to be installed", remedy)
    remedy = f"Its copy is damaged, or a library is of a version that it cannot use. {GET_A_HOST}"
    return HostError(culprit, str(error), "it to import", remedy)


def _forget_host() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


# ---- the side effects of its import ----


@contextmanager
def _contained() -> Iterator[None]:
    """Put back what importing EasyEdit changes for the whole process."""
    with ExitStack() as stack:
        # Main seeds all random generators with 42 as it is imported.
        for keep in (randomness_kept, _root_logger_kept, _launches_kept, _optional_kernels_untold):
            stack.enter_context(keep())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")  # where warnings are errors, those of its code would stop the import
        for category in (SyntaxWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """It calls `logging.basicConfig`, which would make every library log to the terminal at level INFO."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _optional_kernels_untold() -> Iterator[None]:
    """bitsandbytes, where it is installed, warns on a CPU of faster kernels that nothing here uses."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _launches_kept() -> Iterator[None]:
    """Main sets CUDA_LAUNCH_BLOCKING, which slows down everything that runs on a GPU.

    Not the whole environment: libraries that are first imported on the way set variables that they rely on.
    """
    before = os.environ.get("CUDA_LAUNCH_BLOCKING")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_LAUNCH_BLOCKING", None)
        else:
            os.environ["CUDA_LAUNCH_BLOCKING"] = before
