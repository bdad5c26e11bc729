"""What the user asks for, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphere_plugin.errors import RequestError
from sphere_plugin.parsing import is_whole


@dataclass(frozen=True)
class Fact:
    """One edit: after ``before + subject + after`` the model should say ``target``.

    Attributes:
        before: the prompt up to the subject.
        subject: what the fact is about.
        after: the prompt behind the subject.
        target: the new object, beginning with a space.
    """

    before: str
    subject: str
    after: str
    target: str

    @property
    def prompt(self) -> str:
        """The whole prompt, subject filled in."""
        return self.before + self.subject + self.after


def read_requests(requests: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """Check EasyEdit requests and turn them into facts.

    Args:
        requests: mappings with ``prompt`` (the subject written out, or ``{}`` in its place), ``subject`` and
            ``target_new`` (a string, or CounterFact's ``{"str": ...}``). Where the subject stands in the prompt more
            than once, the last mention is edited: it alone has seen the whole prompt before it.

    Raises:
        RequestError: names the request, the field and its value.
    """
    if isinstance(requests, Mapping | str) or not isinstance(requests, Sequence):
        raise RequestError("requests", requests, "a list of requests", "Write [request] for a single one.")
    if len(requests) == 0:
        raise RequestError("requests", list(requests), "at least one fact", "Pass the facts to edit.")
    return [read_request(request, f"requests[{number}]") for number, request in enumerate(requests)]


def read_request(request: Mapping[str, Any], where: str) -> Fact:
    """Check one request; ``where`` names it in errors. See :func:`read_requests`."""
    if not isinstance(request, Mapping):
        raise RequestError(where, request, "a mapping", "Give it the keys prompt, subject and target_new.")
    prompt = _text(request.get("prompt"), f"{where}.prompt", "the sentence to complete")
    subject = _text(request.get("subject"), f"{where}.subject", "the entity the fact is about")
    target = request.get("target_new")
    if isinstance(target, Mapping):
        target = target.get("str")
    target = _text(target, f"{where}.target_new", "the new object")
    if prompt.count("{}") > 1:
        raise RequestError(f"{where}.prompt", prompt, "one {} for the subject", "Write the other places out.")
    marker = "{}" if "{}" in prompt else subject
    if marker not in prompt:
        raise RequestError(
            f"{where}.subject", subject, f"words that stand in the prompt {prompt!r}", "Write it exactly as there."
        )
    before, after = prompt.rsplit(marker, 1)
    return Fact(before, subject, after, target if target.startswith(" ") else " " + target)


def _text(value: object, where: str, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(where, value, f"{what}, a non-empty string", "Fill it in or leave the fact out.")
    if not is_whole(value):
        raise RequestError(where, value, f"{what}, without halves of characters", "Type it anew.")
    return value
