"""Take edits back, bit for bit, whatever the method. Run it in the repository's folder."""

import sphere_plugin as sp

sp.register()  # finds EasyEdit; before the first import of easyeditor
from easyeditor import BaseEditor, ROMEHyperParams  # noqa: E402

FACTS = [("The capital of Australia is", "Australia", "Vienna"), ("The capital of France is", "France", "Rome")]

hparams = ROMEHyperParams.from_hparams("hparams/ROME/smollm2-135m.yaml")
hparams.sphere = True
editor = BaseEditor.from_hparams(hparams)


def say(prompt: str) -> str:
    ids = editor.tok(prompt, return_tensors="pt")
    return editor.tok.decode(editor.model.generate(**ids, max_new_tokens=2, do_sample=False)[0])


def told(moment: str) -> None:
    print(f"{moment}: {'; '.join(say(prompt) for prompt, _, _ in FACTS)}")


told("unedited")
with sp.journal(editor) as journal:  # a folder as second argument keeps it
    prompts, subjects, targets = (list(column) for column in zip(*FACTS, strict=True))
    editor.edit(prompts, targets, subject=subjects, ground_truth=["?"] * 2, sequential_edit=True, verbose=False)
    told("two edits")
    journal.undo()
    told("one edit")
    journal.undo()
    told("none")
