"""Can α be chosen from the update itself? A run of SPHERE once more, holding back only what U has beyond chance.

RUN is a folder of `sphere run`, of one entry with +sphere. An update without a direction of its own has the share
r / d_in of its squared norm along U; α is the one after which that much is left, 0 where there was no more. The same
facts are edited anew and scored at the run's checkpoints, edit by edit beside it. docs/results has what came out.
"""

import argparse
import json
from math import exp, sqrt
from pathlib import Path
from statistics import fmean

import sphere_plugin as sp
from sphere_plugin.data import held_out, read_records
from sphere_plugin.evaluation import Quality
from sphere_plugin.report.paired import bootstrap, permutation
from sphere_plugin.restraints import Restrained
from sphere_plugin.sequence.entries import hparams_of, settings_of
from sphere_plugin.sequence.settings import RunSettings

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", metavar="RUN", type=Path)
parser.add_argument("--to", metavar="N", type=int, help="edit so many facts (default: all of the run)")
parser.add_argument("--json", type=Path, required=True, help="where all numbers are written")
given = parser.parse_args()


class FromUpdate(sp.EditingConfig):
    def restraint(self):
        return self

    def bind(self, pretrained):
        whole = sp.SphereConfig(self.eta, 1.0, self.basis, self.row_normalize).bind(pretrained)

        def restrain(weight, delta):
            outside = whole(weight, delta)  # ΔW(I − UUᵀ)
            share, chance = outside.removed_share, outside.rank / delta.shape[1]
            kept = min(1.0, sqrt(chance * (1 - share) / (1 - chance) / share)) if share else 1.0  # 1 − α
            update = outside.delta + kept * (delta - outside.delta)
            return Restrained(update, share * (1.0 - kept**2), outside.rank)

        return restrain


settings = RunSettings.from_mapping(json.loads((given.run / "manifest.json").read_text())["settings"])
(entry,) = settings.entries
hparams = hparams_of(entry, settings.hparams, settings.model, settings_of(entry, settings.settings))
model, tokenizer = sp.load_model(str(hparams.model_name))
records = read_records(settings.data, settings.edits, settings.order)
quality = Quality(model, tokenizer, records, held_out(settings.text), settings.neighbours)
editor, rows = sp.Editor(model, tokenizer, FromUpdate(**vars(hparams.editing()))), []
for done in range(0, given.to or settings.edits, settings.batch_size):
    report = editor.apply([vars(record) for record in records[done : done + settings.batch_size]])
    edits = done + report.facts
    rows.append({"edits": edits, "removed": [layer.removed_share for layer in report.layers]})
    if edits in settings.checkpoints:
        fixed = json.loads((given.run / "checkpoints" / f"{edits:06d}.json").read_text())
        ours, theirs = quality.score(edits, fixed["scored"]), fixed["scores"]
        difference = [one - other for one, other in zip(ours.efficacy, theirs["efficacy"], strict=True)]
        means = [fmean(ours.efficacy), fmean(theirs["efficacy"]), fmean(difference)]
        rows[-1] |= {"efficacy": means, "interval": bootstrap(difference), "p": permutation(difference)}
        rows[-1] |= {"perplexity": [exp(ours.nll), exp(theirs["nll"])]}  # here, in RUN; of efficacy the difference too
        print(rows[-1], flush=True)
    given.json.write_text(json.dumps({"entry": entry, "batches": rows}, indent=1) + "\n")
