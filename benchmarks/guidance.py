"""What guidance does to unseen combinations: site and class recovered, variety and distance, by form and scales.

    python benchmarks/guidance.py RUN [--encoder NAME] [--weights FILE] [--quick] [--json FILE]

RUN is a finished experiment's folder, such as the demo's. Every setting generates the same plan, the combinations
without a training patch, from the same seeds. It is measured by probes of other real patients, held-out combinations
included, in an encoder that should be one that nothing was tuned on (SqueezeNet's ImageNet features by default). The
distance is Fréchet's after a projection onto the real training features' main directions; recall (Kynkäänniemi et al.
2019) says how much of the real patches' variety is there. "none" is unguided, and "real" other real patients.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from output import options, report

from latent_medi.core import config
from latent_medi.core.progress import set_up_logging
from latent_medi.diffusion.settings import GuidanceSettings
from latent_medi.evaluation.cohort.comparison_sets import REAL, held_out_comparisons
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import load_encoder
from latent_medi.planning.plan import read_plan
from latent_medi.sampling.generate import generate_plan

INTERVAL = (0.0, 0.25)
"""Range of ᾱ of all settings but the last; overall colour and layout are decided there."""

SCALES = ((1.0, 2.0), (2.0, 1.0), (1.5, 1.5), (2.0, 2.0), (3.0, 3.0), (2.0, 3.0), (4.0, 2.0))
"""w of the class, w of every metadata field."""


def settings_of(run: ExperimentSettings, class_field: str) -> dict[str, GuidanceSettings]:
    """Guidance by name."""
    found = {"none": GuidanceSettings()}
    for form in ("chain", "margins"):
        for of_class, of_metadata in SCALES:
            if form == "margins" and max(of_class, of_metadata) > 2:
                continue  # the sum of margins is strong already
            scales = {class_field: of_class}
            name = f"{form}_class_{of_class:g}_metadata_{of_metadata:g}"
            found[name] = GuidanceSettings(form, of_metadata, scales, interval=INTERVAL)
    found["chain_class_2_metadata_2_everywhere"] = GuidanceSettings("chain", 2.0)
    found["chain_class_3_metadata_3_rescaled"] = GuidanceSettings("chain", 3.0, interval=INTERVAL, rescale=0.7)
    return found


def recalls(settings: EvaluateSettings, encoder_name: str, weights: str | None) -> dict[str, float]:
    """Mean recall over the unseen combinations, by synthetic set."""
    study, encoder = open_study(settings), load_encoder(encoder_name, weights, settings.device)
    cache = Path(settings.out) / "features"
    used = np.unique(np.concatenate([study.probe, study.reference]))
    real = np.zeros((len(study.index), encoder.dim), np.float32)
    real[used] = cached_features(study.real, used, encoder, cache, settings.batch, settings.device)
    made = {
        each.name: cached_features(each.dataset, np.arange(len(each.index)), encoder, cache, settings.batch, "cpu")
        for each in study.synthetic.values()
    }
    found: dict[str, list[float]] = {}
    for comparison in held_out_comparisons(study, settings.seed):
        for name, rows in comparison.rows.items():
            sample = (real if name == REAL else made[name])[rows]
            recall = neighbourhoods(real[comparison.reference], sample).recall
            found.setdefault(name, []).append(np.nan if recall is None else recall)
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = options(__doc__, "a sixth of the images and three settings")
    parser.add_argument("run", type=Path, help="folder of a finished experiment")
    parser.add_argument("--encoder", default="squeezenet", help="encoder of all measures")
    parser.add_argument("--weights", help="the encoder's weights, if the package does not include them")
    parser.add_argument("--only", nargs="+", help="names of settings, such as none chain_class_3_metadata_3")
    parser.add_argument("--out", type=Path, help="folder for what is generated; RUN/guidance by default")
    arguments = parser.parse_args()
    set_up_logging()
    run = config.build(ExperimentSettings, yaml.safe_load((arguments.run / "settings.yaml").read_text("utf-8")))
    out: Path = arguments.out or arguments.run / "guidance"
    plan = read_plan(arguments.run / "plan-medi.csv")
    unseen = plan[plan["verdict"].isin(["both margins seen", "thin"]) & (plan["count"] > run.seen_per_cell)]
    unseen = unseen.assign(count=14 if arguments.quick else 48)
    first = str(unseen.columns[0])  # the class stands first in a schema
    chosen = settings_of(run, first)
    if arguments.quick:
        chosen = {name: chosen[name] for name in ("none", *list(chosen)[4:6])}
    if arguments.only:
        if unknown := [name for name in arguments.only if name not in chosen]:
            parser.error(f"there is no setting {unknown[0]}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in arguments.only}
    for name, guidance in chosen.items():
        generating = replace(run.generate, guidance=guidance)
        generate_plan(pd.DataFrame(unseen), arguments.run / "medi" / "model", out / name, generating)
    weights: dict[str, Any] = {"weights": {arguments.encoder: arguments.weights}} if arguments.weights else {}
    settings = EvaluateSettings(
        real=str(arguments.run / "data"),
        synthetic={name: str(out / name) for name in chosen},
        out=str(out),
        held_out=run.held_out,
        encoders=[arguments.encoder],
        colour_free=False,
        site_field=run.site_field,
        downstream=False,
        memorisation=False,
        real_splits=0,
        seed=run.seed,
        **weights,
    )
    metrics = evaluate(settings)
    means = metrics.fidelity[arguments.encoder].unseen.means
    fields = metrics.adherence[arguments.encoder].fields
    variety = recalls(settings, arguments.encoder, arguments.weights)
    measured: dict[str, dict[str, float | None]] = {}
    for name in (*chosen, REAL):
        found = {"site": fields[run.site_field], "class": fields[first]}
        row = {k: (f.real if name == REAL else f.synthetic[name]).value for k, f in found.items()}
        row |= {"recall": variety[name], "fd_pca": means[name].fd_pca, "kid": means[name].value}
        measured[name] = row
    print(pd.DataFrame(measured).T.round(3).to_string(), file=sys.stderr)
    report({f"{name}_{what}": value for name, row in measured.items() for what, value in row.items()}, arguments.json)


if __name__ == "__main__":
    main()
