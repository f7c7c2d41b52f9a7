"""A small network trained on the pixels, as the other classifier of the downstream comparison.

Every arm gets the same number of steps, the same batches of its own patches for the same seed, and the same initial
weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_medi.core.device import exact_fp32
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger, progress
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.classifiers import Learned
from latent_medi.evaluation.downstream.training_sets import Drawer, Lesson, Plan
from latent_medi.evaluation.settings import CnnSettings
from latent_medi.features.encoders import ImageEncoder
from latent_medi.features.networks import Network, Preprocessing, read_weights
from latent_medi.features.registry import IMAGENET_MEAN, IMAGENET_STD

log = get_logger(__name__)


class PatchPools:
    """Patches of every source, addressed by pairs (source, row), which stand in for features in a drawer.

    Args:
        study: The cohort.
        plan: Holds the patches that rivals made; None if there are none.
    """

    def __init__(self, study: Study, plan: Plan | None) -> None:
        self._readers: list[Callable[[np.ndarray], np.ndarray]] = [study.real.read]
        self.real = _pairs(0, np.arange(len(study.index)))
        self.arms: dict[str, np.ndarray] = {}
        for arm in study.synthetic.values():
            self.arms[arm.name] = _pairs(len(self._readers), arm.rows)
            self._readers.append(arm.dataset.read)

        def keep(images: np.ndarray) -> np.ndarray:
            self._readers.append(lambda rows: images[rows])
            return _pairs(len(self._readers) - 1, np.arange(len(images)))

        self.made = plan.made(keep) if plan else {}

    def drawer(self, study: Study, plan: Plan, nearest_site: Sequence[str | None]) -> Drawer:
        """A drawer whose features are pairs."""
        return Drawer(study, plan, self.real, self.arms, self.made, nearest_site)

    def read(self, pairs: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] of pairs [n, 2], which a drawer may have made floating point.

        Raises:
            UserError: A patch is damaged, or the sources differ in patch size.
        """
        sources, rows = np.asarray(pairs).astype(np.int64).T
        parts = {int(s): self._readers[s](rows[sources == s]) for s in np.unique(sources)}
        shapes = {p.shape[1:] for p in parts.values()}
        if len(shapes) > 1:
            raise UserError(
                f"A network cannot learn from patches of different sizes together: {sorted(shapes)}.",
                "Use synthetic patches of the real ones' size, or classifier: probe.",
            )
        images = np.empty((len(rows), *shapes.pop()), np.uint8)
        for source, part in parts.items():
            images[sources == source] = part
        return images


def _pairs(source: int, rows: np.ndarray) -> np.ndarray:
    return np.column_stack([np.full(len(rows), source), rows]).astype(np.int64)


class CnnLearner:
    """Trains a small network from the same start in every arm.

    Args:
        study: The cohort.
        pools: The patches.
        encoder: Gives the colour channel, and the network itself where ``settings.network`` is "encoder".
        settings: The network and its training.
        lessons: Networks that will be trained, for the estimate of the time left; 0 if unknown.

    Raises:
        UserError: Weights that do not fit.
    """

    random = True

    def __init__(
        self, study: Study, pools: PatchPools, encoder: ImageEncoder, settings: CnnSettings, lessons: int = 0
    ) -> None:
        self.pools, self.settings, self.device = pools, settings, encoder.device
        self.classes = study.classes
        self.test = pools.real[study.test]
        self._start, self._prepare = _network(encoder, settings, len(self.classes))
        total = lessons * settings.steps or None
        self._steps = progress(_endless(), total, "training networks", "step")
        self.about = {
            "classifier": "cnn",
            "network": encoder.name if settings.network == "encoder" else settings.network,
            "steps": settings.steps,
            "batch": settings.batch,
            "seeds": settings.seeds,
        }

    @exact_fp32()
    def learn(self, lesson: Lesson, seed: int) -> Learned:
        """Train on a lesson of pairs and judge the test patches.

        With patches to learn from first, half of the steps go to them and half to the others.
        """
        settings = self.settings
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.random.fork_rng(), flags:
            torch.manual_seed(seed)
            model = self._start().to(self.device)
            first = 0
            if lesson.first is not None and len(lesson.first[1]):
                first = settings.steps // 2
                self._train(model, *lesson.first, None, first, seed + 1)
            loss = self._train(model, lesson.features, lesson.labels, lesson.weights, settings.steps - first, seed)
        probabilities = self._judge(model)
        predicted = np.array(self.classes)[probabilities.argmax(axis=1)]
        return Learned(predicted, probabilities, math.isfinite(loss))

    def _train(
        self, model: nn.Module, pairs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, steps: int, seed: int
    ) -> float:
        """Loss of the last step. Classes are weighted alike unless weights are given, as for the probe."""
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
            loss.backward()
            optimizer.step()
            value = loss.detach()
        final = float(value)
        if not math.isfinite(final):
            log.warning("A network's loss is not finite after %d steps; lower cnn.learning_rate.", steps)
        return final

    @torch.no_grad()
    def _judge(self, model: nn.Module) -> np.ndarray:
        model.eval()
        size = self.settings.batch
        parts = []
        for start in range(0, len(self.test), size):
            logits = model(self._prepare(self.pools.read(self.test[start : start + size])))
            parts.append(torch.softmax(logits.double(), dim=1).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))


def _endless() -> Iterator[None]:
    while True:
        yield None


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
    """What makes a fresh network from the current random state, and what prepares its input."""
    if settings.network == "encoder":

        def tuned() -> nn.Module:
            body = copy.deepcopy(encoder.module).requires_grad_(True)
            return nn.Sequential(body, nn.Linear(encoder.dim, n_classes))

        return tuned, encoder.prepare

    from torchvision.models import get_model

    state = read_weights(settings.weights) if settings.weights else None

    def fresh() -> nn.Module:
        model = get_model(settings.network, weights=None, num_classes=n_classes)
        if state is not None:
            _load_body(model, state, settings.weights)
        return model

    with torch.random.fork_rng():
        fresh()  # weights that do not fit are refused before anything is trained
    channel = encoder.preprocessing.channel
    how = Preprocessing(settings.size, IMAGENET_MEAN, IMAGENET_STD, "bilinear", channel)
    return fresh, ImageEncoder(Network(settings.network, nn.Identity(), 0, how, ""), encoder.device).prepare


def check_network(settings: CnnSettings) -> None:
    """Refuse a network that there is not, or one without a step.

    Raises:
        UserError: Names the value and what it may be.
    """
    if min(settings.steps, settings.batch, settings.seeds) < 1:
        raise UserError("cnn.steps, cnn.batch and cnn.seeds must each be 1 or more.")
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


def lesson_count(drawer: Drawer, only: Sequence[str], seeds: int) -> int:
    """Networks that a comparison trains, for the estimate of its time."""
    chosen = {a: v for a, v in drawer.variants().items() if not only or a in only}
    # What reweighting learns is a variant of oversampling too.
    return len({v if v == "balance" else (a, v) for a, names in chosen.items() for v in names}) * seeds
