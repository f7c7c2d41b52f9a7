"""Whether guidance by a latent classifier makes an unconditional model draw the class that is wanted.

    python benchmarks/guidance_by_classifier.py runs/demo [--squeezenet WEIGHTS] [--quick] [--json FILE]

Of the demo's data and latents it trains what is not there yet: a model that knows no field
(`latent-medi train --config demo/medi model.fields=[]`), and the classifier (`latent-medi classifier --config
demo/classifier`). For every scale it then draws the same noise once for every class, guided to it, and asks a linear
probe for the class of each image. It was fitted on further real patients (--probe-patients per class and hospital) that
neither the model nor the classifier was trained on; its ceiling is its balanced accuracy on the run's test patients.
At scale 0 the images are the same whatever is wanted, so recovery is 1 / classes exactly: that is chance. `spread` is
the variance of the samples of a class around their mean, over that of as many real patches: 1 is as various as real
ones, and less is what guidance costs.

With --clean the classifier is trained on clean latents, as in HistoDiffusion's released code, in place of noisy ones.

Two encoders measure: the demo's own, and, given its weights, SqueezeNet at 224 px, which nothing here was made with.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from demo_tissue import demo_run, in_batches, real_patches
from output import options, report

from latent_medi.core import config
from latent_medi.diffusion.guidance import ClassifierGuidance, Guidance
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.diffusion.settings import SamplerSettings
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import ImageEncoder, load_encoder
from latent_medi.latent_classifier.network import LatentClassifier
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latent_classifier.train import train_classifier
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.statistics.linear_probe import fit_linear_probe
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings

CONTROL_PART = "test"
"""Part of the demo's split: the patients of the probe's ceiling."""

FIRST_SEED = 1_000


def train_both(
    run: Path, out: Path, quick: bool, model_steps: int, classifier_steps: int, clean: bool
) -> tuple[Path, Path]:
    """Folders of the unconditional model and of the classifier, trained unless they are there."""
    where = [f"data={run / 'data'}", f"latents={run / 'latents'}"]
    short = ["max_steps=20"] if quick else []
    words = ["--config", "demo/medi", *where, f"out={out / 'uncond'}", "model.fields=[]"]
    words += [f"max_steps={model_steps}"] if model_steps else []
    model = train(config.parse(TrainSettings, [*words, *short]))
    folder = out / ("classifier-clean" if clean else "classifier")
    words = ["--config", "demo/classifier", *where, f"model={model}", f"out={folder}"]
    words += ["noise_aware=false"] if clean else []
    words += [f"max_steps={classifier_steps}"] if classifier_steps else []
    short += ["validation_patches=64"] if quick else []
    trained = train_classifier(config.parse(ClassifierSettings, [*words, *short]))
    return model, Path(trained["classifier"])


def draw(
    pipeline: MediPipeline, classifier: LatentClassifier, scale: float, each: int, sampler: SamplerSettings, low: float
) -> dict[str, np.ndarray]:
    """Images uint8 [each, H, W, 3] guided to each value, all from the same noise."""
    noise, _ = draw_noise(range(FIRST_SEED, FIRST_SEED + each), pipeline.latent_shape)
    images: dict[str, np.ndarray] = {}
    for value in classifier.values:
        if scale == 0 and images:  # nothing guides: the same images
            images[value] = next(iter(images.values()))
            continue
        guidance = Guidance(classifier=ClassifierGuidance(classifier.log_probability([value]), scale, (low, 1.0)))
        images[value] = pipeline.decode(pipeline.generate_latents(None, noise, sampler, guidance))
    return images


def measures_of(
    encoder: ImageEncoder,
    name: str,
    dataset: PatchDataset,
    field: str,
    samples: dict[float, dict[str, np.ndarray]],
    learn: tuple[np.ndarray, pd.DataFrame],
    cache: Path,
) -> dict[str, float]:
    """Recovery and spread at each scale, and the linear probe's accuracy on real patches."""
    rows = dataset.rows({f"{SPLIT_PREFIX}main": CONTROL_PART})
    features, labels = cached_features(dataset, rows, encoder, cache), dataset.index[field].to_numpy(dtype=str)[rows]
    examples, known = learn
    probe = fit_linear_probe(encoder.features(in_batches(examples)), known[field].to_numpy(str))
    found = probe.predict(features)
    wanted = sorted(next(iter(samples.values())))
    result = {f"{name}_ceiling": float(np.mean([np.mean(found[labels == v] == v) for v in wanted]))}
    for scale, images in samples.items():
        made = {value: encoder.features([images[value]]) for value in wanted}
        hits = [float(np.mean(probe.predict(made[value]) == value)) for value in wanted]
        spread = []
        for value in wanted:
            real = features[labels == value][: len(made[value])]
            spread.append(float(made[value].var(0).sum() / real.var(0).sum()))
        result[f"{name}_recovery_scale_{scale:g}"] = float(np.mean(hits))
        result[f"{name}_lowest_class_scale_{scale:g}"] = min(hits)
        result[f"{name}_spread_scale_{scale:g}"] = float(np.mean(spread))
    return result


def measure(words: argparse.Namespace, out: Path) -> dict[str, float]:
    """All numbers, flat."""
    model, folder = train_both(words.run, out, words.quick, words.model_steps, words.classifier_steps, words.clean)
    pipeline, classifier = MediPipeline.from_pretrained(model), LatentClassifier.from_pretrained(folder)
    classifier.check_model(pipeline)
    dataset = PatchDataset.open(words.run / "data")
    each, sampler = words.each, SamplerSettings(words.sampler, words.steps)
    scales = words.scales
    if words.quick:
        each, sampler, scales = 4, SamplerSettings("dpmpp_2m", 4), scales[:2]
    samples = {scale: draw(pipeline, classifier, scale, each, sampler, words.lowest_alpha_bar) for scale in scales}
    encoders = {"demo": load_encoder("demo")}
    if words.squeezenet:
        encoders["squeezenet"] = load_encoder("squeezenet@224", words.squeezenet)
    result: dict[str, float] = {"classes": len(classifier.values), "images_per_class": each}
    for row in classifier.provenance["scores"]:
        result[f"classifier_f1_t_{row['timesteps']}"] = row["f1"]
    learn = real_patches(demo_run(words.run).seed, "probe", 4 if words.quick else words.probe_patients)
    for name, encoder in encoders.items():
        measured = measures_of(encoder, name, dataset, classifier.field, samples, learn, out / "features")
        best = max((s for s in scales if s), key=lambda s: measured[f"{name}_recovery_scale_{s:g}"])
        result |= measured
        result |= {f"{name}_best_scale": best, f"{name}_recovery_best": measured[f"{name}_recovery_scale_{best:g}"]}
    return result


def main() -> None:
    """Train what does not exist yet, sample, measure and report."""
    parser = options(__doc__, quick="20 updates, 4 images per class, 2 scales: says that it runs, not how well")
    parser.add_argument("run", type=Path, help="folder with the demo's data and latents")
    parser.add_argument("--out", type=Path, help="folder of the two trainings (default: inside the run)")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--each", type=int, default=60, help="images per class and scale")
    parser.add_argument("--sampler", default="dpmpp_2m", help="name of the sampler")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps")
    parser.add_argument("--lowest-alpha-bar", type=float, default=0.005, help="guidance acts above this ᾱ")
    parser.add_argument(
        "--model-steps", type=int, default=0, help="updates of the model (default: the configuration's)"
    )
    parser.add_argument("--classifier-steps", type=int, default=0, help="updates of the classifier (likewise)")
    parser.add_argument("--clean", action="store_true", help="train the classifier on clean latents alone")
    parser.add_argument("--probe-patients", type=int, default=100, help="patients per class and hospital for the probe")
    parser.add_argument("--squeezenet", type=Path, help="weights of the second encoder")
    words = parser.parse_args()
    if words.quick:
        with tempfile.TemporaryDirectory() as folder:
            report(measure(words, Path(folder)), words.json)
    else:
        report(measure(words, words.out or words.run), words.json)


if __name__ == "__main__":
    main()
