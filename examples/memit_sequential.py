"""MEMIT + SPHERE, sequentially: 60 facts in batches of 10 with and without SPHERE, all scored at the end.

EasyEdit scores an edit right after it was made, which does not show what later edits undo.
"""

from statistics import fmean

import sphere_plugin as sp

sp.register()
from easyeditor import BaseEditor  # noqa: E402

from sphere_plugin.data import held_out, read_records  # noqa: E402
from sphere_plugin.evaluation import Quality  # noqa: E402
from sphere_plugin.sequence import SequentialRun  # noqa: E402

EDITS, BATCH = 60, 10
records = read_records(limit=EDITS)

for alpha in (0.0, 0.8):
    hparams = sp.SphereHyperParams.from_hparams("hparams/SPHERE/smollm2-135m.yaml")
    hparams.base_method, hparams.alpha = "MEMIT", alpha
    hparams.projection = "post"
    editor = BaseEditor.from_hparams(hparams)
    editor.apply_algo.editor.prepare()  # key statistics: counted once, then kept in the cache
    quality = Quality(editor.model, editor.tok, records, held_out())
    *_, last = SequentialRun(editor, records, quality, BATCH, [EDITS])
    kept, reached = fmean(last.scores.efficacy_exact), fmean(last.scores.generalization_exact)
    name = "MEMIT + SPHERE" if alpha else "MEMIT"
    print(f"{name:15} {EDITS} edits: {kept:.2f} still said, {reached:.2f} in other words")
