"""Inputs that nobody would write by hand, and the count of how they end: right, or in an error that says everything.

How many each test makes is a share of what the profile has (`pytest --hypothesis-profile nightly` has ten times the
default); the default makes the same ones at each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from sphere_plugin.errors import SphereError

# ---- counting ----


def share(part: float = 1.0) -> settings:
    """Settings of a test that makes this share of the profile's number of inputs."""
    profile = settings()
    return settings(
        max_examples=max(5, round(part * profile.max_examples)),
        derandomize=settings.get_current_profile_name() != "nightly",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@dataclass
class Tally:
    """How the inputs of one test ended.

    Attributes:
        of: what they are: "requests", "yaml", …
        inputs, right, refused: how many there were, and how they ended.
    """

    of: str
    inputs: int = 0
    right: int = 0
    refused: int = 0

    @contextmanager
    def one(self, good: bool | None = None) -> Iterator[None]:
        """One input, and in the block what is done with it and whether that is right.

        Args:
            good: whether it has to be taken, or has to be refused; None where only the library knows.
        """
        self.inputs += 1
        try:
            yield
        except SphereError as error:
            says_everything(error)
            assert good is not True, f"refused, though it is good: {error}"
            self.refused += 1
        else:
            assert good is not False, "taken, though it is bad"
            self.right += 1

    def told(self, record_property: Callable[[str, object], None]) -> None:
        """Into the report of pytest."""
        assert self.inputs == self.right + self.refused > 0
        for name in ("inputs", "of", "right", "refused"):
            record_property(name, getattr(self, name))


def says_everything(error: SphereError) -> None:
    """Culprit, value, expectation and remedy are there, can be read, and are short enough to be."""
    culprit, expected, remedy = error.culprit, error.expected, error.remedy
    for part in (culprit, expected, remedy):
        assert isinstance(part, str) and part.strip(), error.args
    assert remedy.rstrip()[-1] in ".?!)", remedy
    head, _, tail = str(error).partition(f"{culprit}: got ")
    value = tail.rpartition(f", expected {expected}. {remedy}")[0]
    assert head == "" and value.strip(), str(error)
    assert len(str(error)) < 20_000


# ---- texts ----

RTL = ("ברלין", "القاهرة", "تهران", "שָׁלוֹם")
ODD = (
    "Zürich", "Zu\u0308rich", "東京", "ไทย", "नई दिल्ली", "🇫🇷 Paris", "👩\u200d👩\u200d👧", "\u200bzero",
    "a\u202eb\u202c", "İstanbul", "ﬁne", "ẞ", "x" * 40, "A", ".", "5", "'s", "don't", "<s>", "</s>", "<pad>",
    "Paris\n", "\tTab", "a  b", "NULL\0byte", "\x85next", "{}", "{0}",
)  # fmt: skip
HALVES = ("\ud83d", "a\udc00", "\ud800\ud800")
WORDS = ("Paris", "Eiffel Tower", "the", "Leo Tolstoy", "Windows 95", "is in", "was born in the city of")


def texts(max_size: int = 12) -> st.SearchStrategy[str]:
    """Any text: plain words, other scripts, right to left, odd ones, halves of characters, nothing at all."""
    whole = st.sampled_from((*WORDS, *RTL, *ODD))
    free = st.text(st.characters(codec="utf-8"), max_size=max_size)
    return st.one_of(whole, whole, free, st.sampled_from(("", " ", "\n", "\u3000", *HALVES)))


def good_texts(max_size: int = 12) -> st.SearchStrategy[str]:
    """Texts with something in them and without halves of characters."""
    return texts(max_size).filter(is_good)


def is_good(text: object) -> bool:
    """What a prompt, a subject and a target have to be."""
    return isinstance(text, str) and bool(text.strip()) and not any(0xD800 <= ord(one) < 0xE000 for one in text)


# ---- values of YAML and JSON ----

NUMBERS = (0, 1, -1, 2, 0.5, 1.5, -0.5, 1e-12, 1e300, 10**30, 10**400, 2**63, math.nan, math.inf, -math.inf)
WRONG_TEXTS = (
    "",
    " ",
    "auto",
    "1e-3",
    ".5",
    "nan",
    "0x10",
    "~nobody/x",
    "a\0b",
    "a" * 5000,
    "../../x",
    "{}",
    "\ud800",
)


def values(depth: int = 6) -> st.SearchStrategy[Any]:
    """What may stand behind a key: right now and then, mostly not."""
    small = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WRONG_TEXTS), texts())
    small |= st.integers(-3, 40) | st.floats(-2, 2)
    inside = st.recursive(
        small,
        lambda one: st.lists(one, max_size=3) | st.dictionaries(texts(4), one, max_size=3),
        max_leaves=depth,
    )
    return st.one_of(small, small, inside)


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any], one_in: int = 8) -> st.SearchStrategy[Any]:
    """Good ones, and a bad one now and then."""
    return st.integers(1, one_in).flatmap(lambda number: bad if number == one_in else good)


@st.composite
def changed(draw: st.DrawFn, good: dict[str, Any], known: tuple[str, ...] = (), most: int = 2) -> dict[str, Any]:
    """A good mapping with at most so many keys given other values, taken out, or put in."""
    content = dict(good)
    for _ in range(draw(st.integers(0, most))):
        key = draw(st.one_of(st.sampled_from(sorted({*good, *known})), texts(6) if known else st.nothing()))
        if draw(st.integers(0, 5)) == 0:
            content.pop(key, None)
        else:
            content[key] = draw(values())
    return content


def broken(text: str) -> st.SearchStrategy[str]:
    """The text with a piece cut out, doubled, or put in: what editors, copies and disks do to files."""
    bits = (
        "[", "]", "{", "}", ":", "- ", '"', "'", "&a ", "*a", "!!int ", "!!binary x", "<<: ", "\t", "\n", "\\ud800",
        "?", "2001-99-99", "null", "NaN", "1e999", "|", ">", "%", "@", "`", "#", "\x00", "\ufeff", "\u2028",
    )  # fmt: skip

    def bent(place: int, length: int, what: str | None) -> str:
        at = place % (len(text) + 1)
        middle = text[at : at + length]
        return text[:at] + (middle * 2 if what is None else what) + text[at + length :]

    return st.builds(bent, st.integers(0, 10_000), st.integers(0, 20), st.none() | st.sampled_from(("", *bits)))


# ---- tensors ----

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SOUND = (
    "normal",
    "decaying",
    "rank one",
    "rank deficient",
    "one row",
    "doubled rows",
    "scaled rows",
    "sparse",
    "constant",
)
EXTREME = ("zero row", "huge", "tiny", "one huge row", "one tiny row", "near rows")
FLAWED = ("nan", "inf", "minus inf", "zeros", "integers", "empty", "vector", "cube", "bool")


@dataclass(frozen=True)
class Made:
    """A tensor and how it was made."""

    tensor: Tensor
    kind: str

    def __repr__(self) -> str:
        one = self.tensor
        return f"Made({self.kind}, {tuple(one.shape)}, {one.dtype}, strides {one.stride()})"


@st.composite
def matrices(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = SOUND + EXTREME + FLAWED,
    size: int = 24,
    dtypes: tuple[Any, ...] = DTYPES,
) -> Made:
    """Tensors that are passed for weights; most are matrices."""
    kind = draw(st.sampled_from(kinds))
    rows, columns = (draw(st.one_of(st.just(1), st.integers(1, size), st.integers(1, size))) for _ in range(2))
    dtype = draw(st.sampled_from(dtypes))
    plain = torch.randn(rows, columns, generator=seeded(draw(st.integers(0, 10**6))), dtype=torch.float64)
    tensor = _shaped(plain, kind, dtype)
    layout = draw(st.sampled_from(("plain", "turned", "strided", "leaf")))
    if tensor.dim() == 2 and layout == "turned":
        tensor = tensor.T.contiguous().T
    if tensor.dim() == 2 and layout == "strided":
        tensor = torch.stack([tensor, tensor], dim=2)[:, :, 0]
    if layout == "leaf" and tensor.is_floating_point():
        tensor = tensor.clone().requires_grad_()
    return Made(tensor, kind)


def seeded(seed: int) -> torch.Generator:
    """A generator of one's own."""
    return torch.Generator().manual_seed(seed)


def _shaped(plain: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    rows, columns = plain.shape
    top = {torch.float16: 4.0, torch.float64: 200.0}.get(dtype, 37.0)  # powers of ten
    if kind == "decaying":
        plain = plain * torch.arange(1, columns + 1) ** -2.0
    elif kind == "rank one":
        plain = plain[:, :1] @ plain[:1]
    elif kind == "rank deficient":
        plain = plain[:, : max(1, min(rows, columns) // 2)] @ plain[: max(1, min(rows, columns) // 2)]
    elif kind == "one row":
        plain = plain[:1]
    elif kind == "doubled rows":
        plain = torch.cat([plain, plain[:1]])
    elif kind == "scaled rows":
        plain = plain * torch.logspace(-3, 3, rows, dtype=plain.dtype)[:, None]
    elif kind == "sparse":
        plain = torch.zeros_like(plain).index_put((torch.tensor(rows - 1), torch.tensor(0)), plain[0, 0])
    elif kind == "constant":
        plain = torch.full_like(plain, 0.25)
    elif kind == "zero row":
        plain[rows // 2] = 0
    elif kind in ("huge", "tiny"):
        plain = plain.clamp(-1, 1) * 10 ** (top if kind == "huge" else -top)
    elif kind == "one huge row":
        plain[0] = plain[0].clamp(-1, 1) * 10**top
    elif kind == "one tiny row":
        plain[0] *= 10**-top
    elif kind == "near rows":
        plain = torch.cat([plain, plain[:1] * (1 + 1e-7)])
    elif kind in ("nan", "inf", "minus inf"):
        plain[rows // 2, columns // 2] = {"nan": math.nan, "inf": math.inf}.get(kind, -math.inf)
    elif kind == "zeros":
        plain = torch.zeros_like(plain)
    elif kind == "empty":
        plain = plain[:0]
    elif kind == "vector":
        plain = plain[0]
    elif kind == "cube":
        plain = plain[None]
    if kind in ("integers", "bool"):
        return (plain * 10).to(torch.int64 if kind == "integers" else torch.bool)
    return plain.to(dtype)


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a floating point matrix of finite entries that are not all zero, entry by entry."""
    if tensor.dim() != 2 or tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return False
    entries = [entry for row in tensor.detach().double().tolist() for entry in row]
    return all(map(math.isfinite, entries)) and any(entries)


# ---- what a model says, one plain pass at a time ----


def follow(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of the target as it stands behind it."""
    ids, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + target)["input_ids"]
    behind = whole[len(ids) :]
    if whole[: len(ids)] != ids or not behind:
        behind = tokenizer(target, add_special_tokens=False)["input_ids"]
    return ids, behind


def state_at(model: Any, layer: Any, ids: list[int], place: int) -> Tensor:
    """The layer's output at a place."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0, place]


def loss_with(model: Any, layer: Any, ids: list[int], targets: list[int], place: int, moved: Tensor) -> float:
    """Mean −log p of the targets behind the ids where the layer's output at a place is moved so."""

    def put(module: Any, args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[0, place] += moved
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = layer.register_forward_hook(put)
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([[*ids, *targets[:-1]]])).logits[0].log_softmax(dim=1)
    handle.remove()
    return -sum(float(logs[len(ids) - 1 + n, token]) for n, token in enumerate(targets)) / len(targets)


def said(model: Any, tokenizer: Any, prompt: str, target: str) -> list[bool]:
    """Whether each token of the target is the first choice where it stands behind the prompt."""
    ids, targets = follow(tokenizer, prompt.rstrip(), target if target.startswith(" ") else f" {target}")
    with torch.no_grad():
        choices = model(input_ids=torch.tensor([[*ids, *targets]])).logits[0].argmax(dim=1).tolist()
    return [choices[len(ids) - 1 + n] == token for n, token in enumerate(targets)]


def spelled(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """The bytes each token of a byte-level tokenizer stands for."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes other bytes as letters from 256 on
    others = [n for n in range(256) if n not in own]
    table = {chr(n): n for n in own} | {chr(256 + place): n for place, n in enumerate(others)}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    texts = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return [special[n].encode() if n in special else bytes(table[letter] for letter in text) for n, text in texts]
