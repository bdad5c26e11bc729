"""ROME + SPHERE: a method of EasyEdit with its updates projected. Run it in the repository's folder.

Any method that writes weights goes the same way; docs/methods.md lists them.
"""

import logging

import sphere_plugin as sp

logging.basicConfig(format="%(message)s")
sp.register()  # finds EasyEdit; from now on every method's settings may have `sphere`
logging.getLogger("sphere_plugin").setLevel(logging.INFO)  # one line per edit: what was written
from easyeditor import BaseEditor, ROMEHyperParams  # noqa: E402

FACTS = [
    ("The capital of Australia is", "Australia", "Vienna"),
    ("The Eiffel Tower is in the city of", "Eiffel Tower", "Rome"),
    ("The author of Don Quixote is", "Don Quixote", "Shakespeare"),
]
UNEDITED = "The capital of France is"

hparams = ROMEHyperParams.from_hparams("hparams/ROME/smollm2-135m.yaml")
hparams.sphere = {"eta": 0.5, "alpha": 0.8}  # as `sphere: {eta: 0.5, alpha: 0.8}` in the YAML
editor = BaseEditor.from_hparams(hparams)


def say(prompt: str) -> str:
    ids = editor.tok(prompt, return_tensors="pt")
    return editor.tok.decode(editor.model.generate(**ids, max_new_tokens=3, do_sample=False)[0])


prompts, subjects, targets = (list(column) for column in zip(*FACTS, strict=True))
before = [say(prompt) for prompt in [*prompts, UNEDITED]]
editor.edit(prompts, targets, subject=subjects, ground_truth=["?"] * 3, sequential_edit=True, verbose=False)
for old, prompt in zip(before, [*prompts, UNEDITED], strict=True):
    print(f"{old!r} -> {say(prompt)!r}")
