"""Edit one fact in a real model through EasyEdit's BaseEditor. Run it in the repository's folder."""

import sphere_plugin as sp

sp.register()  # finds EasyEdit and enters SPHERE; before the first import of easyeditor
from easyeditor import BaseEditor  # noqa: E402

editor = BaseEditor.from_hparams(sp.SphereHyperParams.from_hparams("hparams/SPHERE/smollm2-135m.yaml"))


def say(prompt: str) -> str:
    ids = editor.tok(prompt, return_tensors="pt")
    return editor.tok.decode(editor.model.generate(**ids, max_new_tokens=2, do_sample=False)[0])


print(say("The capital of Australia is"))
editor.edit(["The capital of Australia is"], ["Vienna"], subject=["Australia"], sequential_edit=True, verbose=False)
print(say("The capital of Australia is"))
print(say("The capital of France is"))
