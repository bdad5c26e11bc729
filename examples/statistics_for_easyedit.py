"""Key statistics for EasyEdit's own methods, of any text: with them ROME, MEMIT and others need no Wikipedia.

YAML is one for SPHERE: its layers, text and number of texts count. What is written lies where EasyEdit's YAMLs look
for it with `stats_dir: OUT` and the given name and number of samples, whatever text it is of.
"""

import argparse
import io
from pathlib import Path

import numpy as np

import sphere_plugin as sp
from sphere_plugin.editing.anatomy import Anatomy
from sphere_plugin.editing.statistics import key_moments
from sphere_plugin.files import write_bytes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("yaml", metavar="YAML")
parser.add_argument("out", metavar="OUT", type=Path)
parser.add_argument("--dataset", default="wikipedia", help="mom2_dataset of EasyEdit's YAML (default: %(default)s)")
parser.add_argument("--samples", type=int, default=100000, help="mom2_n_samples of it (default: %(default)s)")
given = parser.parse_args()

hparams = sp.SphereHyperParams.from_hparams(given.yaml)
model, tokenizer = sp.load_model(hparams.model_name)
anatomy = Anatomy.of(model, hparams.editing())
moments = key_moments(anatomy, tokenizer, hparams.editing())

known = model.config._name_or_path  # the PyPI release looks under all of it
where = Path(known).name if sp.register().kind == "main" else known.replace("/", "_")
folder = given.out / where / f"{given.dataset}_stats"
for layer, moment in moments.items():
    name = anatomy.rewrites[layer].name.removesuffix(".weight")
    content = {"mom2.constructor": "SecondMoment()", "mom2.count": 1, "mom2.mom2": moment.numpy()}
    file, path = io.BytesIO(), folder / f"{name}_float32_mom2_{given.samples}.npz"
    np.savez(file, sample_size=given.samples, **content)
    write_bytes(path, file.getvalue())
    print(path)
