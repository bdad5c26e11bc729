"""RECT as a method, RECT before SPHERE, and RECT as a key on another method. Run it in the repository's folder."""

import logging

import sphere_plugin as sp

logging.basicConfig(format="%(message)s")
sp.register()
logging.getLogger("sphere_plugin").setLevel(logging.INFO)
from easyeditor import BaseEditor, ROMEHyperParams  # noqa: E402

FACT = {"prompts": ["The capital of Australia is"], "target_new": ["Vienna"], "subject": ["Australia"]}

rect = sp.RectHyperParams.from_hparams("hparams/RECT/smollm2-135m.yaml")  # MEMIT with RECT
both = sp.RectHyperParams.from_hparams("hparams/RECT/smollm2-135m.yaml")
both.alpha = 0.8  # as `sphere: true` in the YAML
rome = ROMEHyperParams.from_hparams("hparams/ROME/smollm2-135m.yaml")
rome.rect = {"keep": 0.4}  # any method that writes weights takes the key

for hparams in (rect, both, rome):
    editor = BaseEditor.from_hparams(hparams)
    metrics, model, _ = editor.edit(**FACT, ground_truth=["Canberra"], sequential_edit=True, verbose=False)
    ids = editor.tok(FACT["prompts"][0], return_tensors="pt")
    print(hparams.alg_name, "says:", editor.tok.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0]))
