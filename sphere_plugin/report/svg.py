"""Figures as SVG inside the page: its colours, its fonts, no id twice, points that answer to the pointer."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.etree import ElementTree

from sphere_plugin.report.style import COLOURS, GRID, INK, MUTED, settings

XLINK: Final = "{http://www.w3.org/1999/xlink}href"
DROPPED: Final = frozenset(("metadata", "style"))


def svg(figure: Any, name: str, title: str, tips: Mapping[str, Sequence[str]]) -> str:
    """Returns a figure as an SVG element.

    Args:
        figure: matplotlib's.
        name: what its ids begin with; no two figures of a page may share it.
        title: read to who cannot see it.
        tips: id of an artist -> a text for each of its points.
    """
    import matplotlib

    content = io.BytesIO()
    with settings(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(content.getvalue())
    _plain(root)
    _own(root, tips)
    _ids(root, name)
    for side in ("width", "height", "version"):
        root.attrib.pop(side, None)
    root.attrib |= {"role": "img", "aria-label": title, "class": "chart"}
    return _themed(ElementTree.tostring(root, encoding="unicode"))


def themes() -> tuple[str, str]:
    """Returns the CSS variables of the families' colours, for light and for dark."""
    light, dark = ("".join(f"--f{k}:{pair[side]};" for k, pair in enumerate(COLOURS)) for side in (0, 1))
    return light, dark


def _plain(element: ElementTree.Element) -> None:
    """Drop namespaces, which HTML does not need, and what is not drawn."""
    element.tag = element.tag.partition("}")[2] or element.tag
    if XLINK in element.attrib:
        element.attrib["href"] = element.attrib.pop(XLINK)
    for child in list(element):
        _plain(child)
        if child.tag in DROPPED:
            element.remove(child)


def _own(root: ElementTree.Element, tips: Mapping[str, Sequence[str]]) -> None:
    """Mark what belongs to an entry with its class, and points with what to show over them."""
    for element in root.iter("g"):
        name = element.get("id", "")
        if re.fullmatch(r"m\d+-\d+", name):
            element.set("class", f"of {name.partition('-')[0]}")
        points = [one for one in element.iter("use")]
        if name in tips and len(points) == len(tips[name]):
            for point, tip in zip(points, tips[name], strict=True):
                point.set("data-tip", tip)


def _ids(root: ElementTree.Element, name: str) -> None:
    """Keep the ids that are referred to, under names of this figure."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    for element in root.iter():
        if element.get("id") in used:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))


def _themed(text: str) -> str:
    """Replace the colours on white by the page's."""
    names = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)"}
    names |= {pair[0]: f"var(--f{k})" for k, pair in enumerate(COLOURS)}
    pattern = re.compile("|".join(names), re.IGNORECASE)
    return pattern.sub(lambda found: names[found.group().lower()], text)
