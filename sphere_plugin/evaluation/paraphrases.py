"""Other ways to say a prompt: from templates of this project, from the record, or from a file in the paper's form.

The paper (seed 003, C.2, D.2.2) has a large model write six paraphrases of a question, from near-identical to formal.
The templates follow its criteria for LLaMA3 (Table 9): 1 near-identical, 2 simpler, 3 indirect, 4 reordered,
5 creative, 6 formal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from sphere_plugin.data import Record
from sphere_plugin.errors import RequestError
from sphere_plugin.parsing import json_of
from sphere_plugin.paths import user_path

LEVELS: Final = 6
TEMPLATES: Final = "templates"
RECORD: Final = "record"
_FORM: Final = 'Write [{"question": …, "generated_questions": [{"level": 1, "rephrase": …}, …]}], see docs/audit.md.'

# Words a question begins with; they lose their capital behind something. Any other may be a name.
_BEGINNINGS: Final = frozenset(
    ("what", "which", "who", "whom", "whose", "where", "when", "why", "how", "in", "on", "at", "by", "from", "for")
    + ("to", "of", "with", "during", "after", "the", "a", "an", "is", "are", "was", "were", "did", "does", "do")
    + ("has", "have", "had", "can", "could", "will", "would", "name")
)
_NQ: Final = re.compile(r"nq question:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Probe:
    """A prompt and how else it can be said.

    Attributes:
        record: position of the fact in its file.
        prompt: as the record has it.
        subject: of the fact; "" where the prompt is about another one that is not known.
        source: where the paraphrases come from.
        prompts: the paraphrases, two or more.
    """

    record: int
    prompt: str
    subject: str
    source: str
    prompts: tuple[str, ...]


# What a source makes of a record: source and paraphrases, or nothing where it has none.
Paraphrases = tuple[str, tuple[str, ...]]
Source = Callable[[Record], Paraphrases | None]


def edited(record: Record, source: Source) -> Probe | None:
    """The edited fact; None where the source has no paraphrases of it."""
    found = source(record)
    return None if found is None else Probe(record.position, record.prompt, record.subject, *found)


def neighbours(record: Record, source: Source, most: int) -> list[Probe]:
    """The first ``most`` neighbourhood prompts; of templates where the source has nothing on one.

    A neighbour that reads like the fact itself, but for its subject, is paraphrased as the fact is.
    """
    probes = []
    shape = re.escape(record.prompt).replace(re.escape(record.subject), "(.+)", 1) if record.subject else ""
    for prompt in record.neighbours[:most]:
        like = re.fullmatch(shape, prompt) if "(.+)" in shape else None
        subject, relation = (like[1], record.relation) if like else ("", "")
        near = Record(prompt, subject, "", (), (), relation=relation, position=record.position)
        name, prompts = source(near) or templated(near)
        probes.append(Probe(record.position, prompt, subject, name, prompts))
    return probes


def templated(record: Record) -> Paraphrases:
    """Six levels: of the record's relation where it is known, else of a question or of a sentence to complete."""
    known = _templates()
    if record.subject and record.relation in known["relations"]:
        source, forms, text = f"templates of {record.relation}", known["relations"][record.relation], record.subject
    elif record.prompt.rstrip().endswith("?") or _NQ.match(record.prompt):
        source, forms, text = "templates of questions", known["question"], _question(record.prompt)
    else:
        source, forms, text = "templates of sentences", known["completion"], record.prompt.strip()
    return source, tuple(_filled(form, text) for form in forms)


def recorded(record: Record) -> Paraphrases | None:
    """The prompt and the paraphrases of the record itself, each once; no levels."""
    prompts = tuple(dict.fromkeys(text.strip() for text in (record.prompt, *record.paraphrases) if text.strip()))
    return ("the record", prompts) if len(prompts) > 1 else None


def source_of(name: str) -> Source:
    """The source of that name: "templates", "record", or a file in the form of the paper's Tables 7 to 9.

    Raises:
        RequestError: the file cannot be read, or is not of that form; names the item.
    """
    if name == TEMPLATES:
        return templated
    if name == RECORD:
        return recorded
    return partial(_of_file, f"file {Path(name).name}", read_paraphrases(Path(name)))


def read_paraphrases(path: Path) -> Mapping[str, tuple[str, ...]]:
    """Question -> its paraphrases, in the order of their levels.

    Raises:
        RequestError: see `source_of`.
    """
    try:
        content = json_of(user_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        expected = f"{TEMPLATES}, {RECORD}, or a file that can be read ({error.strerror})"
        raise RequestError("--paraphrases", str(path), expected, _FORM) from error
    except ValueError as error:
        raise RequestError("--paraphrases", str(path), f"a JSON array ({error})", _FORM) from error
    if not isinstance(content, list) or not content:
        raise RequestError("--paraphrases", f"{path}: {type(content).__name__}", "a JSON array of questions", _FORM)
    found: dict[str, tuple[str, ...]] = {}
    for number, item in enumerate(content):
        question, prompts = _item(item, f"{path}[{number}]")
        if found.setdefault(question, prompts) != prompts:
            raise RequestError(f"{path}[{number}].question", question, "each question once", "Leave one of them out.")
    return found


def _item(item: Any, where: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(item, Mapping):
        raise RequestError(where, item, "an object with a question", _FORM)
    question, ways = item.get("question"), item.get("generated_questions")
    if not isinstance(question, str) or not question.strip():
        raise RequestError(f"{where}.question", question, "the prompt of the fact", _FORM)
    if not isinstance(ways, list):
        raise RequestError(f"{where}.generated_questions", ways, "a list of paraphrases", _FORM)
    levels: dict[int, str] = {}
    for number, way in enumerate(ways):
        place = f"{where}.generated_questions[{number}]"
        level, text = (way.get("level"), way.get("rephrase")) if isinstance(way, Mapping) else (None, None)
        if type(level) is not int or not 1 <= level <= LEVELS or level in levels:
            raise RequestError(f"{place}.level", level, f"a whole number from 1 to {LEVELS}, each once", _FORM)
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"{place}.rephrase", text, "a text", _FORM)
        levels[level] = text.strip()
    prompts = tuple(dict.fromkeys(levels[level] for level in sorted(levels)))
    if len(prompts) < 2:
        remedy = "Drift is measured from one paraphrase to another: give two or more."
        raise RequestError(f"{where}.generated_questions", list(prompts), "different paraphrases", remedy)
    return question.strip(), prompts


def _of_file(source: str, known: Mapping[str, Sequence[str]], record: Record) -> Paraphrases | None:
    found = known.get(record.prompt.strip())
    return None if found is None else (source, tuple(found))


def _templates() -> Mapping[str, Any]:
    content = files("sphere_plugin.data").joinpath("paraphrases.json").read_text(encoding="utf-8")
    known: Mapping[str, Any] = json.loads(content)
    return known


def _question(prompt: str) -> str:
    """A question as one writes it; of the Natural Questions, which ZsRE has for neighbours, without their mark."""
    text = _NQ.sub("", prompt.strip(), count=1)
    return text if text.endswith("?") else f"{text}?"


def _filled(form: str, text: str) -> str:
    """The template with ``text`` in it; a capital where it begins, none where it goes on behind a comma."""
    head, _, tail = form.partition("{}")
    first = text.partition(" ")[0]
    if head.rstrip().endswith(",") and first.lower() in _BEGINNINGS:
        text = text[0].lower() + text[1:]
    elif not head or head.rstrip().endswith((":", ".")):
        text = text[0].upper() + text[1:] if first in _BEGINNINGS else text
    return f"{head}{text}{tail}"
