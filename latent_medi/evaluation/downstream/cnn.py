"""A small network trained on the pixels, the other downstream classifier.

Every training set gets the same number of steps and the same initial weights, and for one seed the same order of its
own patches.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_medi.core.device import exact_fp32
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger, progress
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.downstream.classifiers import Prediction
from latent_medi.evaluation.downstream.records import ClassifierRecord
from latent_medi.evaluation.downstream.training_sets import Additions, Sources, TrainingSet
from latent_medi.evaluation.settings import CnnSettings
from latent_medi.features.encoders import ImageEncoder
from latent_medi.features.networks import Network, read_weights
from latent_medi.features.registry import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

log = get_logger(__name__)


class PatchPools:
    """Patches of every source, addressed by pairs (source, row), which take the place of features in training sets.

    Args:
        study: The cohort.
        additions: Has the derived patches; None if there are none.
    """

    def __init__(self, study: Study, additions: Additions | None) -> None:
        self._readers: list[Callable[[np.ndarray], np.ndarray]] = [study.real.read]
        self.real = _pairs(0, np.arange(len(study.index)))

        def pairs(samples: SyntheticSet) -> np.ndarray:
            self._readers.append(samples.dataset.read)
            return _pairs(len(self._readers) - 1, samples.rows)

        self.synthetic = {name: pairs(samples) for name, samples in study.synthetic.items()}
        self.further_seeds = {name: [pairs(samples) for samples in sets] for name, sets in study.further_seeds.items()}

        def keep(images: np.ndarray) -> np.ndarray:
            self._readers.append(lambda rows: images[rows])
            return _pairs(len(self._readers) - 1, np.arange(len(images)))

        self.derived = additions.derived_features(keep) if additions else {}

    def sources(self, study: Study, additions: Additions, nearest_sites: Sequence[str | None]) -> Sources:
        """Sources whose features are pairs."""
        return Sources(study, additions, self.real, self.synthetic, self.derived, nearest_sites, self.further_seeds)

    def read(self, pairs: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] of pairs [n, 2], which may have become floating point in a training set.

        Raises:
            UserError: A patch is damaged, or the sources differ in patch size.
        """
        sources, rows = np.asarray(pairs).astype(np.int64).T
        parts = {int(s): self._readers[s](rows[sources == s]) for s in np.unique(sources)}
        shapes = {p.shape[1:] for p in parts.values()}
        if len(shapes) > 1:
            raise UserError(
                f"A network cannot be trained on patches of different sizes: {sorted(shapes)}.",
                "Use synthetic patches of the real ones' size, or classifier: linear.",
            )
        images = np.empty((len(rows), *shapes.pop()), np.uint8)
        for source, part in parts.items():
            images[sources == source] = part
        return images


def _pairs(source: int, rows: np.ndarray) -> np.ndarray:
    return np.column_stack([np.full(len(rows), source), rows]).astype(np.int64)


class NetworkClassifier:
    """Trains a small network from the same start on every training set.

    Args:
        study: The cohort.
        pools: The patches.
        encoder: Gives the colour channel, and the network itself where ``settings.network`` is "encoder".
        settings: The network and its training.
        n_networks: Networks that will be trained, for the estimate of the time left; 0 if unknown.

    Raises:
        UserError: Weights that do not fit.
    """

    random = True

    def __init__(
        self, study: Study, pools: PatchPools, encoder: ImageEncoder, settings: CnnSettings, n_networks: int = 0
    ) -> None:
        self.pools, self.settings, self.device = pools, settings, encoder.device
        self.classes = study.classes
        self.test = pools.real[study.test]
        self._start, self._prepare = _network(encoder, settings, len(self.classes))
        total = n_networks * settings.steps * settings.batch or None
        self._steps = progress(itertools.repeat(None), total, "training networks", "patches", settings.batch)
        name = encoder.name if settings.network == "encoder" else settings.network
        self.record = ClassifierRecord("cnn", None, name, settings.steps, settings.batch, settings.seeds)

    @exact_fp32()
    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        """Train on a training set of pairs and predict the test patches.

        Pre-training, if there is any, takes half of the steps.
        """
        settings = self.settings
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.random.fork_rng(), flags:
            torch.manual_seed(seed)
            model = self._start().to(self.device)
            first = 0
            if training_set.pretraining is not None and len(training_set.pretraining[1]):
                first = settings.steps // 2
                self._train(model, *training_set.pretraining, None, first, seed + 1)
            pairs, labels, weights = training_set.features, training_set.labels, training_set.weights
            loss = self._train(model, pairs, labels, weights, settings.steps - first, seed)
        probabilities = self._probabilities(model)
        predicted = np.array(self.classes)[probabilities.argmax(axis=1)]
        return Prediction(predicted, probabilities, math.isfinite(loss))

    def _train(
        self, model: nn.Module, pairs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, steps: int, seed: int
    ) -> float:
        """Loss of the last step. Classes weigh the same unless weights are given, as for the linear probe."""
        settings = self.settings
        codes = np.array([self.classes.index(v) for v in labels.tolist()])
        if weights is None:
            counts = np.bincount(codes, minlength=len(self.classes))
            weights = (len(codes) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[codes]
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        rng = np.random.default_rng([seed, 29])
        model.train()
        value = torch.tensor(math.nan)
        for step, rows in zip(range(steps), _batches(len(codes), settings.batch, rng), strict=False):
            next(self._steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            images = self.pools.read(pairs[rows])
            if settings.flips:
                images = _turned(images, rng)
            target = torch.from_numpy(codes[rows]).to(self.device)
            weight = torch.from_numpy(weights[rows]).float().to(self.device)
            loss = (F.cross_entropy(model(self._prepare(images)), target, reduction="none") * weight).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            value = loss.detach()
        final = float(value)
        if not math.isfinite(final):
            log.warning("A network's loss is not finite after %d steps; lower cnn.learning_rate.", steps)
        return final

    @torch.no_grad()
    def _probabilities(self, model: nn.Module) -> np.ndarray:
        model.eval()
        size = self.settings.batch
        parts = []
        for start in range(0, len(self.test), size):
            logits = model(self._prepare(self.pools.read(self.test[start : start + size])))
            parts.append(torch.softmax(logits.double(), dim=1).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))


def _batches(n: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Full batches for ever: every row once, in random order, then all again in another."""
    left = np.zeros(0, int)
    while True:
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(n)])
        yield left[:size]
        left = left[size:]


def _turned(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each patch turned by a multiple of 90° and flipped at random; square patches, uint8 [n, H, H, 3]."""
    turns, flips = rng.integers(0, 4, len(images)), rng.random(len(images)) < 0.5
    result = np.empty_like(images)
    for i, image in enumerate(images):
        turned = np.rot90(image, turns[i])
        result[i] = turned[:, ::-1] if flips[i] else turned
    return result


def _network(
    encoder: ImageEncoder, settings: CnnSettings, n_classes: int
) -> tuple[Callable[[], nn.Module], Callable[[np.ndarray], Tensor]]:
    """A function that gives a network with new random weights, and one that prepares its input."""
    if settings.network == "encoder":

        def tuned() -> nn.Module:
            body = copy.deepcopy(encoder.module).requires_grad_(True)
            return nn.Sequential(body, nn.Linear(encoder.dim, n_classes))

        return tuned, encoder.prepare

    from torchvision.models import get_model

    state = read_weights(settings.weights) if settings.weights else None

    def fresh() -> nn.Module:
        model: nn.Module = get_model(settings.network, weights=None, num_classes=n_classes)
        if state is not None:
            _load_body(model, state, settings.weights)
        return model

    with torch.random.fork_rng():
        fresh()  # weights that do not fit are refused before anything is trained
    channel = encoder.preprocessing.channel
    how = Preprocessing(settings.size, IMAGENET_MEAN, IMAGENET_STD, "bilinear", channel)
    return fresh, ImageEncoder(Network(settings.network, nn.Identity(), 0, how, ""), encoder.device).prepare


def check_network(settings: CnnSettings) -> None:
    """Refuse an unknown network.

    Raises:
        UserError: Names the closest known one.
    """
    from torchvision import models
    from torchvision.models import list_models

    # These two give further outputs in training.
    known = ["encoder", *(m for m in list_models(module=models) if m not in ("googlenet", "inception_v3"))]
    if settings.network not in known:
        raise UserError(f"There is no network {settings.network!r}; {nearest(settings.network, known)}.")


def _load_body(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load everything but the last layer, which may have another number of classes.

    Raises:
        UserError: Another tensor is missing, unknown or of another shape.
    """
    own = model.state_dict()
    last = list(own)[-1].rpartition(".")[0] + "."
    body = {k: v for k, v in state.items() if not k.startswith(last)}
    expected = {k for k in own if not k.startswith(last)}
    wrong = sorted(expected ^ set(body)) or sorted(k for k in expected if own[k].shape != body[k].shape)
    if wrong:
        raise UserError(f"The weights {where} do not fit the network: {len(wrong)} tensors, such as {wrong[0]!r}.")
    model.load_state_dict(body, strict=False)
