"""Real patches of one hospital translated to another: what a site probe predicts, and how much structure is kept,
compared with Reinhard's and Macenko's stain mapping, the autoencoder round trip and a no-op.

    python benchmarks/translation.py --run runs/prostate --to site=radboud --where class=gleason3 site=karolinska
        [--strength 0.5 1] [--guidance 1] [--encoder squeezenet] [--weights FOLDER] [--sheet PNG] [--quick]
        [--json FILE]

The run folder is what `latent-medi run` or `latent-medi demo` leaves: data/ and medi/model/. Patches are of patients
kept out of training. The probe (a linear one on the encoder's features, in colour and on the haematoxylin channel
alone) classifies the two sites; it is fitted on training patients, on classes that both sites have. Its ceiling is the
share of real held-out patches of the target site that it calls the target's; what it calls so among the untouched
patches is where every way starts. A second probe classifies classes, so that a translation cannot win by changing the
tissue. All shares are averaged over patients.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from output import options, report

from latent_medi.diffusion.guidance import guidance_of
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.sampling.settings import TranslateSettings
from latent_medi.sampling.translate import translate_images, versions
from latent_medi.sampling.translation_baselines import compare, measures_text, write_sheet
from latent_medi.sampling.translation_request import make_request, some_patches
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.linear_probe import LinearProbe, fit_linear_probe

_PATCHES = {False: 1500, True: 400}  # training patches per probe at most; with --quick


def pairs(words: list[str]) -> dict[str, str]:
    """name=value words as a mapping."""
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def drawn(data: PatchDataset, rows: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of some rows, patients in equal parts."""
    return rows[some_patches(data.index["patient"].to_numpy(str)[rows], count, 0)]


def over_patients(hit: np.ndarray, patients: np.ndarray) -> float:
    """Mean over patients of each patient's share."""
    return float(np.mean([hit[patients == p].mean() for p in np.unique(patients)]))


class Probes:
    """Site and class probes on one encoder's features of the training patients.

    Args:
        encoder: The encoder.
        data: The dataset.
        train: Rows of training patients, of the two sites.
        site: Field of the site.
        class_name: The class field.
        most: Patches per probe at most.
    """

    def __init__(
        self, encoder: ImageEncoder, data: PatchDataset, train: np.ndarray, site: str, class_name: str, most: int
    ) -> None:
        self.encoder = encoder
        sites, classes = (data.index[name].to_numpy(str)[train] for name in (site, class_name))
        shared = set.intersection(*(set(classes[sites == s]) for s in np.unique(sites)))
        if not shared:
            raise SystemExit("The two sites share no class among the training patients: a probe would tell classes.")
        kept = drawn(data, train[np.isin(classes, list(shared))], most)
        self.site = self._fit(data, kept, site)
        self.tissue = self._fit(data, drawn(data, train, most), class_name)

    def _fit(self, data: PatchDataset, rows: np.ndarray, field: str) -> LinearProbe:
        return fit_linear_probe(self.features(data.read(rows)), data.index[field].to_numpy(str)[rows])

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 [N, H, W, 3], [N, d]."""
        return self.encoder.features(images[i : i + 64] for i in range(0, len(images), 64))


def main() -> None:
    parser = options(__doc__, "48 patches instead of 256, and probes of 400 training patches instead of 1500")
    parser.add_argument("--run", type=Path, default=Path("runs/prostate"))
    parser.add_argument("--model", type=Path, help="another model folder than medi/model of the run")
    parser.add_argument("--to", nargs=1, default=["site=radboud"])
    parser.add_argument("--where", nargs="+", default=["class=gleason3", "site=karolinska"])
    parser.add_argument("--split", default="main")
    parser.add_argument("--split-value", default="test")
    parser.add_argument("--strength", nargs="+", type=float, default=[1.0])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0], help="scale of the field that is changed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--encoder", default="squeezenet")
    parser.add_argument("--weights", default="")
    parser.add_argument("--sheet", type=Path, help="PNG of eight patches in every way, of the last setting")
    arguments = parser.parse_args()
    to, where = pairs(arguments.to), pairs(arguments.where)
    (site, target), source = next(iter(to.items())), where.get(next(iter(to)))
    if source is None:
        parser.error(f"--where has to say which {site} the patches come from")

    data = PatchDataset.open(arguments.run / "data")
    class_field = data.schema.class_field
    if class_field is None:
        parser.error("the dataset has no class")
    pipeline = MediPipeline.from_pretrained(arguments.model or arguments.run / "medi" / "model")
    part = f"split_{arguments.split}"
    encoder = load_encoder(arguments.encoder, arguments.weights or None)
    train = data.rows({part: "train", site: [source, target], "origin": "real"})
    probes_by_name = {
        name: Probes(which, data, train, site, class_field.name, _PATCHES[arguments.quick])
        for name, which in (("colour", encoder), ("colour_free", colour_free(encoder)))
    }
    ceiling = data.rows({**where, part: arguments.split_value, site: target, "origin": "real"})
    of_patient = data.index["patient"].to_numpy(str)
    tops = {
        name: over_patients(probes.site.predict(probes.features(data.read(ceiling))) == target, of_patient[ceiling])
        for name, probes in probes_by_name.items()
    }
    result: dict[str, float] = {f"{name}_convinced_ceiling": share for name, share in tops.items()}

    count = 48 if arguments.quick else 256
    for strength in arguments.strength:
        for scale in arguments.guidance:
            guidance = guidance_of({site: scale, class_field.name: 1.0} if scale != 1 else None)
            settings = TranslateSettings(
                data=str(data.folder),
                to=dict(to),
                where=dict(where),
                split=arguments.split,
                limit=count,
                split_value=arguments.split_value,
                strength=strength,
                steps=arguments.steps,
                guidance=guidance,
            )
            asked = make_request(settings, pipeline)
            began = time.perf_counter()
            made = translate_images(
                data.read(asked.rows),
                pipeline.conditions(asked.source),
                pipeline.conditions(asked.target),
                pipeline,
                settings,
            )
            seconds = time.perf_counter() - began
            images, ways = versions(asked, np.arange(len(asked.rows)), made, pipeline, settings)
            patients = of_patient[asked.rows]
            measures = compare(images, ways, patients)
            label = f"s{strength:g}_w{scale:g}_" if len(arguments.strength) * len(arguments.guidance) > 1 else ""
            print(f"strength {strength:g}, guidance of {site} {scale:g}\n{measures_text(measures)}", flush=True)
            result |= {"patches": len(images), "patients": len(np.unique(patients))}
            result |= {"ceiling_patches": len(ceiling), "ceiling_patients": len(np.unique(of_patient[ceiling]))}
            result[f"{label}images_per_s"] = len(images) / seconds
            for name, probes in probes_by_name.items():
                for way, version in {"original": images, **ways}.items():
                    features = probes.features(version)
                    key = f"{label if way in ('translated', 'no_op') else ''}{name}"
                    result[f"{key}_convinced_{way}"] = over_patients(probes.site.predict(features) == target, patients)
                    own = data.index[class_field.name].to_numpy(str)[asked.rows]
                    result[f"{key}_class_kept_{way}"] = over_patients(probes.tissue.predict(features) == own, patients)
            for way, found in measures["ways"].items():
                key = f"{label if way in ('translated', 'no_op') else ''}ssim_haematoxylin_{way}"
                result[key] = found["ssim_haematoxylin"]
            result[f"{label}ssim_of_round_trip"] = (
                measures["ways"]["translated"]["ssim_haematoxylin"]
                / measures["ways"]["round_trip"]["ssim_haematoxylin"]
            )
            if arguments.sheet:
                shown = some_patches(patients, min(8, len(images)), 0)
                write_sheet(
                    arguments.sheet,
                    {"original": images[shown], **{n: w[shown] for n, w in ways.items()}},
                    [f"{data.index['key'].iloc[asked.rows[i]]}\n{source}" for i in shown],
                    target,
                    f"strength {strength:g}, {arguments.steps} steps, guidance {scale:g}",
                )
    report(result, arguments.json)


if __name__ == "__main__":
    main()
