"""What an experiment will cost, before it starts: images, bytes, hours, weights, and what is missing.

Images and bytes follow from the settings and the dataset. Hours are images over a rate that was measured, on this
machine (:mod:`latent_medi.experiment.rates`) or on a named GPU; what no rate is known of is called not measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from joblib import cpu_count

from latent_medi.core import config
from latent_medi.core.hub import Weights, offline
from latent_medi.core.tensor_files import tensor_file_bytes
from latent_medi.experiment.cost_records import LONG_STAGES, ExperimentCost, StageCost, days, listed
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.networks import Network, network_of
from latent_medi.experiment.nodes import cores_shared
from latent_medi.experiment.rates import (
    EmbedTrial,
    EncodeTrial,
    Placement,
    SampleTrial,
    TrainTrial,
    Trial,
    measure_rates,
)
from latent_medi.experiment.what_is_known import Known, known_data, planned_images
from latent_medi.features.needed import encoder_weights
from latent_medi.features.registry import ENCODERS
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.info import INFO_FILE as LATENTS_FILE
from latent_medi.latents.size import LatentKind, autoencoder_weights, latent_kind, latents_bytes, open_autoencoder
from latent_medi.sampling.cost import bytes_per_image
from latent_medi.training.estimate.disk import run_files
from latent_medi.training.estimate.rate import CardRate, card_rate
from latent_medi.training.estimate.whole_run import init_weights
from latent_medi.training.settings import TrainSettings

CPU_CONFIGURATIONS = "demo/experiment (procedural tissue) and prostate/64px (real biopsies)"
_LONG_WORK = 1e13
"""Images × parameters from which on training takes hours on a CPU: then even a plain run measures first."""
_DAY = 24 * 3600


def experiment_cost(
    e: Experiment, plans: Mapping[str, pd.DataFrame] | None = None, measure: bool = False
) -> ExperimentCost:
    """What is left of an experiment takes.

    Args:
        e: The experiment, its stages declared.
        plans: The plans by model, if they were made already.
        measure: Whether to measure rates on this machine, which takes up to a minute. A run that would take hours on a
            CPU is measured in any case.
    """
    return _Costing(e, plans).cost(measure)


class _Costing:
    """The parts of an experiment's cost.

    Args:
        e: The experiment.
        plans: The plans by model, if they were made already.
    """

    def __init__(self, e: Experiment, plans: Mapping[str, pd.DataFrame] | None) -> None:
        self.e, settings = e, e.settings
        self.data: Known | None = known_data(e)
        self.images = planned_images(e, plans, self.data)
        self.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.processes, cores = e.where.processes, cpu_count()
        alone = bool(settings.card or self.gpus or self.processes > 1)  # models one after the other
        self.together = 1 if alone else settings.parallel or min(2, cores)
        self.patch_size = self.data.patch_size if self.data else settings.patch_size
        self.autoencoder: Autoencoder | None = open_autoencoder(settings.autoencoder)
        self.kind: LatentKind | None = latent_kind(settings.autoencoder, self.autoencoder)
        self.networks = {model.name: self._network(model.name) for model in e.models.values()}
        self.trials: dict[str, Trial] = {}
        self.start = 0.0
        self.failed: dict[str, str] = {}
        self.done = {name for name in settings.stages if e.stages.finished(name)}

    def _network(self, name: str) -> Network | None:
        shape = self.kind.shape(self.patch_size) if self.kind else None
        schema = self.data.schema if self.data else None
        return network_of(self.e, self.e.models[name], shape, schema, self.processes)

    def cost(self, measure: bool) -> ExperimentCost:
        """All of it."""
        rows = [row for stage in self.e.settings.stages for row in getattr(self, f"_{stage}", self._short)(stage)]
        card = self.e.settings.card
        rates: dict[str, CardRate] = {}
        if card:
            rates = {key: rate for key, trial in self.trials.items() if (rate := self._on_card(trial))}
        elif measure or self._work() > _LONG_WORK:
            found = measure_rates(self.trials, {key: self._placement(key) for key in self.trials})
            each = found.images_per_second
            rates = {key: CardRate(rate * self.processes, "here") for key, rate in each.items()}
            self.start, self.failed = found.start, found.failed
        rows = [self._timed(row, rates) for row in rows]
        weights = self._weights()
        known = [row for row in rows if row.seconds is not None]
        without = [r.stage for r in rows if r.stage in LONG_STAGES and r.seconds is None and not r.finished]
        made = ExperimentCost(
            machine=self._machine(),
            gpus=self.gpus,
            stages=rows,
            training_patches=self.data.training_patches if self.data else None,
            seconds=self._in_all(known),
            not_measured=list(dict.fromkeys(without)),
            weights=weights,
            missing=self._missing(weights),
        )
        return replace(made, notes=self._notes(made))

    def _placement(self, key: str) -> Placement:
        """How the processes of a trial share the machine when the experiment runs."""
        where = self.e.where
        if self.processes > 1:
            threads = where.threads or int(os.environ["OMP_NUM_THREADS"])
            return Placement(1 if self.gpus else self.processes // where.nodes, threads)
        stage = key.split()[0]
        if stage == "evaluate":  # in the runner's own process
            return Placement(1, torch.get_num_threads())
        models = {"train": self._at_same_time(), "sample": len(self.e.sampled)}
        return Placement(*cores_shared(models.get(stage, 1), self.e.settings.parallel))

    def _at_same_time(self) -> int:
        """Models that could be trained at the same time: none of them starts from another."""
        return max((len(wave) for wave in self._waves("train")), default=1)

    def _short(self, stage: str) -> list[StageCost]:
        return [StageCost(stage, finished=stage in self.done)]

    def _shards(self, stage: str) -> list[StageCost]:
        if self.e.settings.data:
            return []
        data = self.data
        size = data.stored if data and data.stored else None
        return [StageCost(stage, images=len(data.index) if data else None, bytes=size, finished=stage in self.done)]

    def _encode(self, stage: str) -> list[StageCost]:
        rows = []
        for name, settings in self.e.encodings.items():
            data = known_data(self.e, name) if name else self.data
            size, patches = None, None
            if data is not None:
                patches = int(data.kept.sum())
                if self.kind is not None:
                    size = latents_bytes(self.kind, data.patch_size, data.kept_counts, settings.views)
            there = (Path(settings.out) / LATENTS_FILE).is_file()
            finished = stage in self.done or (there and Path(settings.out) not in self.e.stages.stale(stage))
            rows.append(StageCost(stage, name, patches, size, finished=finished))
            if not finished:
                there = data is not None and data.dataset is not None
                own = replace(settings, autoencoder=self.e.settings.autoencoder)  # an adapted one is as fast
                self.trials[f"{stage} {name}"] = EncodeTrial(own, self.patch_size, there)
        return rows

    def _train(self, stage: str) -> list[StageCost]:
        rows = []
        for model in self.e.to_train:
            network = self.networks[model.name]
            there = (model.adapter or model.out / "model").is_dir()
            finished = stage in self.done or (there and model.out not in self.e.stages.outdated(stage))
            settings, size = config.make(TrainSettings, model.training or {}, model.name), None
            if network and network.on_meta is not None and not model.adapter:
                inside = self.autoencoder if self._stored_with_models() else None
                size = run_files(network.settings, network.on_meta, inside.model if inside else None).total
            rows.append(
                StageCost(stage, model.name, settings.total_images, size, self.data is not None, finished=finished)
            )
            if network and network.on_meta is not None and not finished and not model.adapter:
                self.trials[f"{stage} {model.name}"] = TrainTrial(network.settings, network.shape, network.schema)
        return rows

    def _classifier(self, stage: str) -> list[StageCost]:
        finished = stage in self.done
        rows = []
        for model in self.e.guided:
            settings = self.e.classifier(model)
            batch = settings.global_batch
            images = settings.max_steps * batch or -(-settings.max_images // batch) * batch
            rows.append(StageCost(stage, model.name, images, finished=finished))
        return rows

    def _autoencoder(self, stage: str) -> list[StageCost]:
        images = self.e.adaptation().training().total_images
        return [StageCost(stage, images=images, finished=stage in self.done)]

    def _real_classifier(self, stage: str) -> list[StageCost]:
        settings = self.e.comparison()
        images = settings.seeds * settings.training().total_images
        return [StageCost(stage, images=images, finished=stage in self.done)]

    def _image_classifier(self, stage: str) -> list[StageCost]:
        """Trainings on each model's samples, all of the same length."""
        settings = self.e.comparison()
        each = settings.seeds * len(settings.choices) * len(settings.percents) * settings.training().total_images
        return [StageCost(stage, name, each, finished=stage in self.done) for name in settings.synthetic]

    def _sample(self, stage: str) -> list[StageCost]:
        rows, each = [], self._bytes_per_image()
        for model in self.e.sampled:
            images, network = self.images.get(model.name), self.networks[model.name]
            size = None if images is None or each is None else round(images * each)
            finished = stage in self.done
            rows.append(StageCost(stage, model.name, images, size, exact=False, finished=finished))
            if network and network.on_meta is not None and not finished and self.autoencoder is not None:
                sampling, evaluations = network.sampling(self.e, model)
                self.trials[f"{stage} {model.name}"] = SampleTrial(
                    network.settings,
                    network.shape,
                    network.schema,
                    sampling,
                    self.e.settings.autoencoder,
                    evaluations,
                )
        return rows

    def _evaluate(self, stage: str) -> list[StageCost]:
        """The embedding of all patches by all encoders: features on the disk, and the time that it takes."""
        settings, finished = self.e.evaluation, stage in self.done
        made = [self.images.get(model.name) for model in self.e.sampled]
        if self.data is None or None in made:
            return [StageCost(stage, finished=finished)]
        samples = [count for count in made if count is not None]
        counts = [len(self.data.index), *samples]
        copies, size = 2 if settings.colour_free else 1, 0
        for text in settings.encoders:
            name, weights = text.split("@")[0], settings.weights.get(text, "")
            if name in ENCODERS:
                size += copies * sum(_features_bytes(count, ENCODERS[name].dim) for count in counts)
            if not finished and encoder_weights(text, weights).found:
                folder = str(self.e.data) if self.data.dataset else ""
                trial = EmbedTrial(text, weights, settings.batch, folder, self.patch_size)
                self.trials[f"{stage} {text}"] = trial
        images = self.data.evaluated(settings) + sum(samples)
        return [StageCost(stage, "", images, size or None, exact=False, finished=finished)]

    def _bytes_per_image(self) -> float | None:
        """Bytes of a sample on the disk; ``None`` before there are patches to compare with."""
        if self.data is None or self.data.dataset is None:
            return None
        return bytes_per_image(self.data.dataset, self.e.settings.generate.codec)

    def _stored_with_models(self) -> bool:
        """Whether a model folder holds the autoencoder's weights: those of a folder, which other machines lack."""
        return self.autoencoder is not None and Path(self.autoencoder.source).is_dir()

    def _work(self) -> float:
        """Images × parameters of all training that is left."""
        left = [t.settings for k, t in self.trials.items() if isinstance(t, TrainTrial) and k.startswith("train ")]
        sizes = [network.parameters for network in self.networks.values() if network]
        return sum(settings.total_images for settings in left) * max(sizes, default=0)

    def _on_card(self, trial: Trial) -> CardRate | None:
        """Images per second of a trial on the named card, as far as training was measured or traced on it."""
        card = self.e.settings.card
        if isinstance(trial, TrainTrial):
            return card_rate(replace(trial.settings, card=card), trial.shape, trial.schema)
        if isinstance(trial, SampleTrial):
            return card_rate(replace(trial.network, card=card), trial.shape, trial.schema, trial.evaluations)
        return None

    def _timed(self, row: StageCost, rates: Mapping[str, CardRate]) -> StageCost:
        if row.finished or row.images is None:
            return row
        if row.stage == "evaluate":
            wanted = [f"evaluate {text}" for text in self.e.evaluation.encoders]
            if any(key not in rates for key in wanted):
                return row
            copies = 2 if self.e.evaluation.colour_free else 1
            took = sum(copies * row.images / rates[key].images_per_second for key in wanted)
            return replace(row, seconds=took, measured="here")
        rate = rates.get(f"{row.stage} {row.model}")
        if rate is None:
            return row
        images = row.images
        if row.stage == "encode":  # decoding for the reconstruction error takes about as long as encoding twice as many
            images += 2 * min(images, self.e.encodings[row.model].reconstruction_error.patches)
        return replace(row, seconds=self.start + images / rate.images_per_second, measured=rate.origin)

    def _in_all(self, rows: list[StageCost]) -> float:
        """Seconds of some rows; of models that run at the same time only the longest counts."""
        total = 0.0
        for stage in dict.fromkeys(row.stage for row in rows):
            taken = {row.model: row.seconds or 0.0 for row in rows if row.stage == stage}
            if stage not in ("train", "sample"):
                total += sum(taken.values())
                continue
            for wave in self._waves(stage):
                total += max((taken.get(name, 0.0) for name in wave), default=0.0)
        return total

    def _waves(self, stage: str) -> list[list[str]]:
        """Models of a stage that run at the same time."""
        models = self.e.to_train if stage == "train" else self.e.sampled
        waiting, waves = list(models), []
        while waiting:
            ready = [m for m in waiting if stage != "train" or m.parent not in waiting]
            names = [model.name for model in ready]
            waves += [names[i : i + self.together] for i in range(0, len(names), self.together)]
            waiting = [model for model in waiting if model not in ready]
        return waves

    def _machine(self) -> str:
        if self.e.settings.card:
            return f"the card {self.e.settings.card}"
        if self.gpus:
            return f"{self.processes} × {torch.cuda.get_device_name()}"
        return f"this machine without a GPU, {cpu_count()} cores"

    def _weights(self) -> list[Weights]:
        e = self.e
        found = [autoencoder_weights(encoding.autoencoder) for encoding in e.encodings.values()]
        if e.has("autoencoder"):
            found = [autoencoder_weights(e.settings.autoencoder)]
        for model in e.to_train:
            source = "" if model.parent else str((model.training or {}).get("init_from") or "")
            found += [weights] if (weights := init_weights(source)) else []
            settings = config.make(TrainSettings, model.training or {}, model.name)
            if settings.preview_encoder:
                found.append(encoder_weights(settings.preview_encoder, settings.preview_weights))
        if e.has("evaluate"):
            found += [encoder_weights(text, e.evaluation.weights.get(text, "")) for text in e.evaluation.encoders]
        return list(dict.fromkeys(found))

    def _missing(self, weights: list[Weights]) -> list[str]:
        settings, found = self.e.settings, []
        if settings.data and self.data is None:
            found.append(f"the dataset folder {settings.data}")
        given = {name: str(getattr(settings, name)) for name in ("source", "metadata", "codes")}
        if not settings.data and not self.e.has_data:
            found += [f"{name}={path}, which does not exist" for name, path in given.items() if path and not _is(path)]
        for one in weights:
            if not one.found and (not one.hub_id or offline()):
                found.append(f"the weights of {one.name}. {one.remedy}")
        return found

    def _notes(self, cost: ExperimentCost) -> list[str]:
        notes = []
        left = [row for row in cost.stages if not row.finished]
        if not self.gpus and not self.e.settings.card and cost.seconds > _DAY:
            notes.append(
                f"This machine has no GPU: what is measured takes {days(cost.seconds)}. Sized for a CPU are "
                f"{CPU_CONFIGURATIONS}; card=NAME says what a GPU would take."
            )
        elif cost.not_measured and not cost.seconds and not self.e.settings.card and not self.failed:
            notes.append("Hours were not measured: dry_run=true measures them.")
        for reason in dict.fromkeys(self.failed.values()):
            names = [name.strip() for name, why in self.failed.items() if why == reason]
            notes.append(f"Hours of {listed(names)} were not measured: {reason}")
        if any(row.stage == "evaluate" for row in left):
            notes.append("evaluate: the embedding of all patches alone; classifiers and intervals come on top.")
        if self.data and self.data.recipe is not None and self.data.dataset is None:
            notes.append(
                "The split is that of the listed patches. Patients who share a picture are found once pixels are read, "
                "and kept in one part: then the plan may have a few images more or less."
            )
        if self.data is None:
            notes.append("Images that depend on the dataset are known once it is made.")
        return notes


def _is(path: str) -> bool:
    return Path(path).exists()


def _features_bytes(count: int, dim: int) -> int:
    """Bytes of the feature cache of one dataset and encoder."""
    parts = [("features", "F32", (count, dim)), ("known", "U8", (count,))]
    return tensor_file_bytes(parts, {"sha256": "0" * 64})
