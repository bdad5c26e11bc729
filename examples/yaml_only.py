"""Plain EasyEdit: nothing here knows of SPHERE, the settings in yaml_only.yaml do, with `sphere: true`. Run it with

sphere launch examples/yaml_only.py
"""

from pathlib import Path

from easyeditor import BaseEditor, ROMEHyperParams

hparams = ROMEHyperParams.from_hparams(str(Path(__file__).with_suffix(".yaml")))
editor = BaseEditor.from_hparams(hparams)
metrics, model, _ = editor.edit(
    prompts=["The capital of Australia is"],
    target_new=["Vienna"],
    subject=["Australia"],
    ground_truth=["Canberra"],
    sequential_edit=True,
    verbose=False,
)
for prompt in ("The capital of Australia is", "The capital of France is"):
    ids = editor.tok(prompt, return_tensors="pt")
    print(editor.tok.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0]))
