"""Make SPHERE, RECT and PRUNE methods of EasyEdit and restraints of its other methods, and undo it without a trace."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping

from sphere_plugin.easyedit.hook import Hooked
from sphere_plugin.easyedit.host import Host, load_host
from sphere_plugin.easyedit.hparams import ALG_NAME
from sphere_plugin.easyedit.keys import accept_keys
from sphere_plugin.easyedit.method import SphereMethod
from sphere_plugin.easyedit.methods import OWN
from sphere_plugin.easyedit.opening import open_editors
from sphere_plugin.easyedit.patches import Patches
from sphere_plugin.easyedit.standins import PACKAGE
from sphere_plugin.process import ONE_AT_A_TIME

_LOG = logging.getLogger("sphere_plugin")


def register(overrides: Mapping[str, object] | None = None) -> Host:
    """Load EasyEdit, enter SPHERE, RECT and PRUNE, and let every method take `sphere`, `rect` and `prune` in its YAML.

    Where EasyEdit has a SPHERE of its own, ours takes its place until :func:`unregister`, and the log says so. What
    is registered lives in EasyEdit's own table of methods; this package keeps no record beside it. Calling it again
    changes nothing, unless it is with other overrides.

    Args:
        overrides: keys that every hparams object of EasyEdit's classes gets from now on, whatever its YAML says, such
            as {"sphere": True}. Those of our own classes have what their YAML says.
            None keeps those of a registration that stands, and is none at all without one.

    Returns:
        The host that was found.

    Raises:
        HostError: there is no EasyEdit, or it cannot be loaded.
    """
    with ONE_AT_A_TIME:
        return _register(overrides)


def _register(overrides: Mapping[str, object] | None) -> Host:
    host = load_host()
    entry = host.alg_dict.get(ALG_NAME)
    if isinstance(entry, SphereMethod):
        if overrides is None or entry.overrides == overrides:
            return host
        entry.undo()
    replaced = ALG_NAME in host.alg_dict
    patches = Patches()
    try:
        _patch(host, patches, overrides or {})
    except BaseException:
        patches.undo()
        raise
    note = "in place of EasyEdit's own, until unregister()" if replaced else "as a new method"
    _LOG.info("SPHERE is registered %s: %s", note, host.describe())
    return host


def _patch(host: Host, patches: Patches, overrides: Mapping[str, object]) -> None:
    batchable = host.batch_editor.is_batchable_method  # type: ignore[attr-defined]
    patches.attribute(
        host.batch_editor, "is_batchable_method", staticmethod(lambda name: name in OWN or batchable(name))
    )
    open_editors(host, patches)
    accept_keys(patches, overrides)
    for name, method in list(host.alg_dict.items()):
        if name not in OWN:
            patches.item(host.alg_dict, name, Hooked(name, method))
    own = SphereMethod(
        restoring="by editor" if host.kind == "main" else "by method",
        undo=functools.partial(_undo, patches),
        overrides=dict(overrides),
    )
    for name in sorted(OWN):
        patches.item(host.alg_dict, name, own)


def unregister() -> None:
    """Put EasyEdit back exactly as it was; without a registration it does nothing.

    Editors that exist already go on with what they were made with.
    """
    with ONE_AT_A_TIME:
        table = sys.modules.get(f"{PACKAGE}.util.alg_dict")
        entry = getattr(table, "ALG_DICT", {}).get(ALG_NAME)
        if isinstance(entry, SphereMethod):
            entry.undo()


def _undo(patches: Patches) -> None:
    patches.undo()
    _LOG.info("SPHERE is unregistered")
