"""What the PyPI host of 2023 needs to run on any device and on today's transformers, done while it is loaded.

`PreparingFinder` finds the modules of that one package; `PreparedLoader` parses the source of each, applies the rules
of `RULES` to its syntax tree and compiles the result. The installed files stay as they are, and no bytecode of the
changed code is read or written. EasyEdit main needs none of this.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, ClassVar, Final

from sphere_plugin.easyedit.standins import PACKAGE, StandInModule
from sphere_plugin.errors import ConfigError, HostError

# ---- what the changed code calls ----


def torch_device(device: Any) -> str:  # noqa: ANN401 - whatever stands in the user's YAML
    """The torch device that a `device` of EasyEdit means, as EasyEdit main reads it; never another one.

    A number n, also as text, is "cuda:n"; any other text is itself: "cpu", "mps", "cuda:1". The host's YAML reader
    makes a float of the text "0", so whole floats are numbers here.
    """
    if isinstance(device, float) and device.is_integer():
        device = int(device)
    text = "" if device is None or isinstance(device, bool) else str(device).strip()
    if not text:
        raise ConfigError("device", device, "a GPU number or a torch device", "Write `device: cpu` or `device: 0`.")
    return f"cuda:{text}" if text.isdigit() else text


def hidden_state(output: Any) -> Any:  # noqa: ANN401 - a tensor, or a tuple that starts with one
    """The hidden state in a layer's output: transformers before 4.56 return a tuple, later ones the tensor itself."""
    return output[0] if isinstance(output, (tuple, list)) else output


def token_id_or_none_such(token_id: int | None) -> int:
    """A token id to compare tensors with. `tensor != None` is one bool rather than a mask, so None becomes -1."""
    return -1 if token_id is None else token_id


def is_tokenizer(thing: object) -> bool:
    """Whether this is a tokenizer of transformers, of whatever class."""
    from transformers import PreTrainedTokenizerBase  # late: to find a host must stay quick

    return isinstance(thing, PreTrainedTokenizerBase)


HELPERS: Final = (torch_device, hidden_state, token_id_or_none_such, is_tokenizer)

# ---- the rules ----


class Rule(ast.NodeTransformer):
    """One kind of change. `seeks` says what it looks for; `changes` counts what it found."""

    seeks: ClassVar[str]

    def __init__(self) -> None:
        self.changes = 0

    def changed(self, new: ast.expr, old: ast.AST) -> ast.expr:
        """Count a change, and give the new code the old line numbers, so that tracebacks fit the file on disk."""
        self.changes += 1
        return ast.fix_missing_locations(ast.copy_location(new, old))


class DeviceFromHparams(Rule):
    """f"cuda:{x}" -> torch_device(x): the host glues "cuda:" to its device, so "cpu" can never be reached."""

    seeks = 'f"cuda:{...}"'

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        match node.values:
            case [ast.Constant(value="cuda:"), ast.FormattedValue(value=device, conversion=-1, format_spec=None)]:
                return self.changed(_call(torch_device, device), node)
        return self.generic_visit(node)


class DeviceOfSpreadModel(Rule):
    """str(model.device).split(":")[1] -> str(model.device): a model that accelerate spread may lie on plain "cpu"."""

    seeks = 'str(....device).split(":")[1]'

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Subscript(
                value=ast.Call(
                    func=ast.Attribute(
                        value=ast.Call(func=ast.Name(id="str"), args=[ast.Attribute(attr="device")]) as device,
                        attr="split",
                    ),
                    args=[ast.Constant(value=":")],
                ),
                slice=ast.Constant(value=1),
            ):
                return self.changed(device, node)
        return node


class DeviceFromModel(Rule):
    """inputs.to("cuda") -> inputs.to(model.device), where the function has a `model`: follow it, wherever it is."""

    seeks = '.to("cuda") in a function with a parameter `model`'

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self.generic_visit(node) if any(a.arg == "model" for a in node.args.args) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(attr="to"), args=[ast.Constant(value="cuda")], keywords=[]):
                device = ast.Attribute(ast.Name("model", ast.Load()), "device", ast.Load())
                return self.changed(ast.Call(node.func, [device], []), node)
        return node


class HiddenState(Rule):
    """cur_out[0], trace.output[0] -> hidden_state(...): on a tensor, [0] would take the first prompt of the batch."""

    seeks = "cur_out[0] or .output[0]"

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Subscript(
                value=(ast.Name(id="cur_out") | ast.Attribute(attr="output")) as output,
                slice=ast.Constant(value=0),
                ctx=ast.Load(),
            ):
                return self.changed(_call(hidden_state, output), node)
        return node


class AnyLlamaTokenizer(Rule):
    """LlamaTokenizer.from_pretrained(x) -> AutoTokenizer.from_pretrained(x, padding_side="right").

    Most models of LLaMA's architecture (SmolLM2, LLaMA 3) have no sentencepiece file. The side is written out because
    the host relies on the padding side that LlamaTokenizer had in 2023; today's pads on the left, where the look-up
    positions of ROME and MEMIT would silently be wrong.
    """

    seeks = "LlamaTokenizer.from_pretrained(...)"

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node.func:
            case ast.Attribute(value=ast.Name(id="LlamaTokenizer"), attr="from_pretrained"):
                side = ast.keyword("padding_side", ast.Constant("right"))
                loader = ast.Attribute(ast.Name("AutoTokenizer", ast.Load()), "from_pretrained", ast.Load())
                return self.changed(ast.Call(loader, node.args, [*node.keywords, side]), node)
        return node


class AnyTokenizerPadsLeft(Rule):
    """isinstance(tok, LlamaTokenizer) -> is_tokenizer(tok).

    With this test the host picks the tokenizers that it sets to left padding; what AutoTokenizer returns belongs to
    them, under whatever class.
    """

    seeks = "isinstance(..., LlamaTokenizer)"

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[thing, ast.Name(id="LlamaTokenizer")]):
                return self.changed(_call(is_tokenizer, thing), node)
        return node


class WeightsInFloat32(Rule):
    """X.from_pretrained(..., device_map=...) -> the same with dtype=torch.float32, where no dtype is given.

    That was the default when the host was written; transformers 5 follows the checkpoint, and an update worked out in
    bfloat16 is another update.
    """

    seeks = "X.from_pretrained(..., device_map=...) without a dtype"

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        given = {keyword.arg for keyword in node.keywords} & {"device_map", "dtype", "torch_dtype"}
        match node.func:
            case ast.Attribute(attr="from_pretrained") if given == {"device_map"}:
                dtype = ast.keyword("dtype", ast.Attribute(ast.Name("torch", ast.Load()), "float32", ast.Load()))
                return self.changed(ast.Call(node.func, node.args, [*node.keywords, dtype]), node)
        return node


class UnknownTokenMayBeMissing(Rule):
    """x != tok.unk_token_id -> x != token_id_or_none_such(...): a byte-level tokenizer has no unknown token."""

    seeks = "... != tok.unk_token_id"

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Compare(ops=[ast.NotEq()], comparators=[ast.Attribute(attr="unk_token_id") as token_id]):
                return self.changed(ast.Compare(node.left, node.ops, [_call(token_id_or_none_such, token_id)]), node)
        return node


# Each rule with the modules it is meant for. A rule that finds nothing in one of them is an error: this is then not
# the EasyEdit that these rules were written for.
RULES: Final[tuple[tuple[type[Rule], tuple[str, ...]], ...]] = (
    (
        DeviceFromHparams,
        (
            "editors.editor",
            "editors.multimodal_editor",
            "evaluate.evaluate",
            "evaluate.evaluate_utils",
            "models.ft.ft_main",
            "models.ike.ike_main",
            "models.kn.kn_main",
            "models.lora.lora_main",
            "models.memit.compute_z",
            "models.memit.memit_main",
            "models.mend.mend_main",
            "models.rome.compute_u",
            "models.rome.compute_v",
            "models.rome.layer_stats",
            "models.serac.serac_main",
            "trainer.algs.MEND",
        ),
    ),
    (DeviceOfSpreadModel, ("editors.editor",)),
    (DeviceFromModel, ("util.perplexity",)),
    (HiddenState, ("models.memit.compute_z", "util.logit_lens")),
    (AnyLlamaTokenizer, ("editors.editor",)),
    (AnyTokenizerPadsLeft, ("editors.editor",)),
    (WeightsInFloat32, ("editors.editor",)),
    (UnknownTokenMayBeMissing, ("models.ft.ft_main",)),
)

# Its copies of BLIP-2 and MiniGPT-4 import names that transformers 5 no longer has. Only multimodal editing uses them.
STAND_IN_MODULE: Final = f"{PACKAGE}.trainer.blip2_models"
STAND_IN_REMEDY: Final = (
    "The PyPI release of EasyEdit edits multimodal models with transformers 4.30 only; text editing is not concerned. "
    "Use a checkout of EasyEdit (EASYEDIT_HOME) for multimodal editing."
)


def prepare(tree: ast.Module, module: str, path: str) -> ast.Module:
    """Apply the rules meant for `module` ("models.ft.ft_main") to its syntax tree.

    Raises:
        HostError: a rule found nothing to change.
    """
    rules = [rule() for rule, modules in RULES if module in modules]
    for rule in rules:
        tree = rule.visit(tree)
        if not rule.changes:
            remedy = f"{path} is not from easyeditor 0.0.1.dev0, the only PyPI release known: install that one."
            raise HostError(f"{PACKAGE}.{module}", "an unknown version", f"to find {rule.seeks}", remedy)
    if rules:
        tree.body[_end_of_preamble(tree) : 0] = [_import_helpers()]
    return ast.fix_missing_locations(tree)


def _end_of_preamble(tree: ast.Module) -> int:
    """How many leading statements must stay first: the docstring and the `from __future__` imports."""
    for index, statement in enumerate(tree.body):
        match statement:
            case ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="__future__"):
                continue
        return index
    return len(tree.body)


def _import_helpers() -> ast.ImportFrom:
    return ast.ImportFrom(__name__, [ast.alias(f.__name__, _private(f.__name__)) for f in HELPERS], 0)


def _private(name: str) -> str:
    """The name of a helper inside a module of the host: with an underscore, `import *` does not pass it on."""
    return f"_sphere_{name}"


def _call(helper: Any, argument: ast.expr) -> ast.Call:  # noqa: ANN401
    return ast.Call(ast.Name(_private(helper.__name__), ast.Load()), [argument], [])


# ---- the import machinery ----


class PreparedLoader(SourceFileLoader):
    """Loads one module of the PyPI host from its source, prepared."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile afresh: the base class would take the bytecode beside the file, which is of the unprepared code."""
        tree = ast.parse(self.get_data(self.path), self.path)
        tree = prepare(tree, fullname.removeprefix(f"{PACKAGE}."), self.path)
        return compile(tree, self.path, "exec", dont_inherit=True)


class StandInLoader(Loader):
    """Loads a stand-in for a module of the host whose source cannot be loaded."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandInModule(spec.name, STAND_IN_REMEDY)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class PreparingFinder(MetaPathFinder):
    """Finds the modules of one `easyeditor` folder and hands them to the loaders above.

    It stays on `sys.meta_path` once the host is loaded, for the modules that EasyEdit and its users import later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        if f"{fullname}.".startswith(f"{STAND_IN_MODULE}."):
            return ModuleSpec(fullname, StandInLoader(), is_package=True)
        found = PathFinder.find_spec(fullname, [str(self.folder.parent)] if path is None else list(path), target)
        if found is None or not isinstance(found.loader, SourceFileLoader):
            return found
        return importlib.util.spec_from_file_location(
            fullname,
            found.loader.path,
            loader=PreparedLoader(fullname, found.loader.path),
            submodule_search_locations=found.submodule_search_locations,
        )
