"""What a selection brings over a random one of the same size: recovery and diversity in combinations that no training
patch has.

    python benchmarks/selection.py runs/demo --weights squeezenet1_0_imagenet.safetensors

Takes the folder of a finished demo, leaves it as it is, and selects half of each combination of its synthetic patches
with one encoder (``--encoder``). Another encoder (``--evaluator``), with linear probes fitted on further real patients
(``--probe-patients``, of neither the training nor the test part), measures in how many patches of the unseen
combinations the requested class and site are found. The peer is random selection of as many patches per combination:
its mean and spread over many draws. Diversity is recall (Kynkäänniemi et al. 2019): the share of real test patches of
the combination within the neighbourhood of a selected one, at the same n.

``default`` is what `latent-medi select` does unasked; the other ways are named by what they rank by, and drop nothing
else. ``histodiffusion`` keeps what lies nearest to the centroid of its own class, as published.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from demo_tissue import demo_run, in_batches, real_patches
from output import options, report

from latent_medi.core.progress import set_up_logging
from latent_medi.evaluation.cohort.combinations import among, any_match, matches
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.results import read_metrics
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import ImageEncoder, load_encoder
from latent_medi.selection.select import select
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.dataset import INDEX_FILE, INFO_FILE, PatchDataset
from latent_medi.statistics.kernel_distance import kid
from latent_medi.statistics.linear_probe import fit_linear_probe

CLASS, SITE = "the class field", "the site field"
ALL = "every categorical field"
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "histodiffusion": {"filters": ["centroid"], "rank": "centroid", "centroids": [[CLASS]], "adjust": False},
    "class": {"filters": []},
    "class_and_site": {"filters": [], "fields": [CLASS, SITE]},
    "all_fields": {"filters": [], "fields": ALL},
    "class_unadjusted": {"filters": [], "adjust": False},
    "class_centroid": {"filters": [], "rank": "centroid", "centroids": [[CLASS]]},
    "distance": {"filters": [], "rank": "distance"},
}
NEIGHBOURS = 5


def columns_only(folder: Path, target: Path) -> Path:
    """A dataset folder with the same shards and its own index, so that the experiment is not changed."""
    target.mkdir()
    for name in (INFO_FILE, INDEX_FILE):
        shutil.copy(folder / name, target / name)
    (target / "data").symlink_to((folder / "data").resolve(), target_is_directory=True)
    return target


class Evaluator:
    """Recovery and recall of patches of unseen combinations.

    Args:
        study: The cohort.
        synthetic: The synthetic dataset.
        encoder: The encoder of all measures.
        examples: Real patches that the linear probes are fitted on, and their fields.
        cache: Folder of the feature cache.
    """

    def __init__(
        self,
        study: Study,
        synthetic: PatchDataset,
        encoder: ImageEncoder,
        examples: tuple[np.ndarray, pd.DataFrame],
        cache: Path,
    ) -> None:
        self.study, self.synthetic = study, synthetic
        self.rows = np.flatnonzero(any_match(synthetic.index, study.held_out))
        self.features = cached_features(synthetic, self.rows, encoder, cache)
        reference = among(study.reference, any_match(study.index, study.held_out))
        self.reference, self.real = reference, cached_features(study.real, reference, encoder, cache)
        learn, known = encoder.features(in_batches(examples[0])), examples[1]
        self.hits: dict[str, np.ndarray] = {}
        self.ceiling: dict[str, float] = {}
        for name in (study.class_field, study.site_field):
            truth = study.index[name].to_numpy(str)
            probe = fit_linear_probe(learn, known[name].to_numpy(str))
            self.hits[name] = probe.predict(self.features) == synthetic.index[name].to_numpy(str)[self.rows]
            self.ceiling[name] = float((probe.predict(self.real) == truth[reference]).mean())
        both = np.logical_and.reduce(list(self.hits.values()))
        self.hits["both"] = both

    def recovery(self, chosen: np.ndarray) -> dict[str, float]:
        """Share of the chosen rows, a mask over the unseen ones, in which a linear probe finds the requested value."""
        return {name: float(hits[chosen].mean()) for name, hits in self.hits.items()}

    def recall(self, chosen: np.ndarray) -> float:
        """Mean over the unseen combinations, at one n for all of them."""
        values = []
        for combination in self.study.held_out:
            real = self.study.having(combination)[self.reference]
            mine = chosen & matches(self.synthetic.index, combination)[self.rows]
            found = neighbourhoods(self.real[real], self.features[mine], NEIGHBOURS).recall
            if found is not None:
                values.append(found)
        return float(np.mean(values)) if values else float("nan")

    def kid(self, chosen: np.ndarray) -> float:
        """Kernel distance to the real test patches of the unseen combinations."""
        return kid(self.real, self.features[chosen])


def main() -> None:
    parser = options(__doc__, "20 random selections instead of 500, two ways to select")
    parser.add_argument("run", type=Path, help="folder of a finished demo")
    parser.add_argument("--synthetic", default="medi", help="which synthetic dataset of it")
    parser.add_argument("--encoder", default="demo", help="encoder that selects")
    parser.add_argument(
        "--evaluator", default="squeezenet@224", help="encoder of the measures; nothing was tuned on it"
    )
    parser.add_argument(
        "--probe-patients", type=int, default=100, help="patients per class and hospital for the probes"
    )
    parser.add_argument("--weights", default="", help="weight file of the evaluating encoder")
    parser.add_argument("--share", type=float, default=0.5, help="share of each combination to select")
    parser.add_argument("--cache", type=Path, help="folder of features; a temporary one unless named")
    arguments = parser.parse_args()
    set_up_logging()
    held_out = read_metrics(arguments.run).dataset.held_out
    with tempfile.TemporaryDirectory() as name:
        folder = columns_only(arguments.run / "synthetic" / arguments.synthetic, Path(name) / "synthetic")
        cache = arguments.cache or Path(name) / "features"
        real = str(arguments.run / "data")
        study = open_study(EvaluateSettings(real=real, synthetic={arguments.synthetic: str(folder)}, held_out=held_out))
        synthetic = study.synthetic[arguments.synthetic].dataset
        examples = real_patches(
            demo_run(arguments.run).seed, "probe", 4 if arguments.quick else arguments.probe_patients
        )
        evaluator = Evaluator(
            study, synthetic, load_encoder(arguments.evaluator, arguments.weights or None), examples, cache
        )
        chooser = load_encoder(arguments.encoder)
        result: dict[str, float] = {"unseen_patches": len(evaluator.rows), "unseen_combinations": len(held_out)}
        result |= {f"{name}_ceiling": value for name, value in evaluator.ceiling.items()}
        rng = np.random.default_rng(0)
        ways = {k: WAYS[k] for k in ("default", "histodiffusion")} if arguments.quick else WAYS
        for way, changes in ways.items():
            changes = named(changes, {CLASS: study.class_field, SITE: study.site_field, ALL: list(study.categorical())})
            settings = SelectSettings(
                data=str(folder), real=real, name=way, share=arguments.share, cache=str(cache), **changes
            )
            selection = select(settings, chooser)
            made = PatchDataset.open(folder)
            chosen = made.index[f"selected_{way}"].to_numpy(bool)[evaluator.rows]
            cells = made.index[selection.recipe["cells"]].astype(str).agg("|".join, axis=1).to_numpy(str)
            cells = cells[evaluator.rows]
            # The control of the selection itself, and many like it: luck is part of the comparison.
            draws = [made.index[f"selected_{way}_control"].to_numpy(bool)[evaluator.rows]]
            while len(draws) < (20 if arguments.quick else 500):
                draws.append(like(chosen, cells, rng))
            recovery = evaluator.recovery(chosen)
            random = {key: np.array([evaluator.recovery(draw)[key] for draw in draws]) for key in recovery}
            result[f"{way}_selected"] = int(chosen.sum())
            result[f"{way}_accepted_share"] = selection.result.total.acceptance
            for key, value in recovery.items():
                result[f"{way}_{key}_recovery"] = value
                result[f"{way}_{key}_recovery_random"] = float(random[key].mean())
                result[f"{way}_{key}_recovery_random_highest_2.5_percent"] = float(np.quantile(random[key], 0.975))
                result[f"{way}_{key}_recovery_over_random"] = value / float(random[key].mean())
            result[f"{way}_recall"] = evaluator.recall(chosen)
            result[f"{way}_recall_random"] = float(np.mean([evaluator.recall(draw) for draw in draws[:20]]))
            result[f"{way}_recall_over_random"] = result[f"{way}_recall"] / result[f"{way}_recall_random"]
            result[f"{way}_kid"] = evaluator.kid(chosen)
            result[f"{way}_kid_random"] = float(np.mean([evaluator.kid(draw) for draw in draws[:20]]))
            for kind in ("pairwise", "nearest"):
                own, other = (getattr(selection.result.diversity[who], kind) for who in ("chosen", "control"))
                result[f"{way}_{kind}_distance_over_random"] = own / other
    report(result, arguments.json)


def named(changes: Any, fields: dict[str, Any]) -> Any:
    """The settings of a way to select with the names that the dataset gives its fields."""
    if isinstance(changes, dict):
        return {key: named(value, fields) for key, value in changes.items()}
    if isinstance(changes, list):
        return [named(value, fields) for value in changes]
    return fields.get(changes, changes) if isinstance(changes, str) else changes


def like(chosen: np.ndarray, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many rows of each cell as were chosen, at random."""
    draw = np.zeros(len(chosen), bool)
    for cell in np.unique(cells):
        rows = np.flatnonzero(cells == cell)
        draw[rng.permutation(rows)[: int(chosen[rows].sum())]] = True
    return draw


if __name__ == "__main__":
    main()
