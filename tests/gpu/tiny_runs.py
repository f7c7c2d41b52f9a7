"""Tiny runs of every kind, for a card that is there and for one in name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from parts import small_model
from safetensors.torch import load_file

from latent_medi.diffusion.settings import GuidanceSettings
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latent_classifier.train import train_classifier
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings

FORMS = {
    "none": GuidanceSettings(),
    "chain": GuidanceSettings("chain", 3.0),
    "margins": GuidanceSettings("margins", 2.0),
    "rescaled": GuidanceSettings("margins", 2.0, rescale=0.7),
    "interval": GuidanceSettings("chain", 3.0, interval=(0.2, 0.9)),
}
"""Every form of guidance over fields."""


def tiny_run(tiny: Path, out: Path, **values: Any) -> TrainSettings:
    """A run of two updates of eight images, in two parts each."""
    defaults: dict[str, Any] = {
        "data": str(tiny / "data"),
        "latents": str(tiny / "latents"),
        "out": str(out),
        "max_steps": 2,
        "global_batch": 8,
        "device_batch": 4,
        "lr": 1e-3,
        "warmup_fraction": 0.0,
        "resident": "ram",
        "log_every_images": 8,
        "checkpoint_every_images": 8,
        "model": small_model(),
    }
    return TrainSettings(**{**defaults, **values})


def tiny_classifier(tiny: Path, out: Path, **values: Any) -> ClassifierSettings:
    """A classifier's run of two updates of eight images, in two parts each."""
    network = EncoderSettings([16, 32], 1, attention_head_dim=16, norm_num_groups=8)
    defaults: dict[str, Any] = {
        "data": str(tiny / "data"),
        "latents": str(tiny / "latents"),
        "out": str(out),
        "max_steps": 2,
        "global_batch": 8,
        "device_batch": 4,
        "resident": "ram",
        "log_every_images": 8,
        "network": network,
    }
    return ClassifierSettings(**{**defaults, **values})


def forget_device() -> None:
    """Let Accelerate, which knows one device and precision per process, choose them again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class Models:
    """Folders of a model, a weaker one, and a classifier of its latents."""

    strong: Path
    weak: Path
    classifier: Path


def make_models(tiny: Path, folder: Path) -> Models:
    """Train all three for a moment."""
    forget_device()
    strong = train(tiny_run(tiny, folder / "strong"))
    weak = train(tiny_run(tiny, folder / "weak", seed=1))
    train_classifier(tiny_classifier(tiny, folder / "classifier", model=str(strong)))
    return Models(strong, weak, folder / "classifier" / "classifier")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}/{k}": v for f in files for k, v in load_file(f).items()}


def furthest(a: Mapping[Any, torch.Tensor], b: Mapping[Any, torch.Tensor]) -> float:
    """Largest relative distance ‖a − b‖/‖b‖ of two sets of tensors of the same names, 0 where both are 0."""
    assert a.keys() == b.keys()
    assert a
    norms = {k: (float((a[k].double() - b[k].double()).norm()), float(b[k].double().norm())) for k in a}
    return max(gap / (norm or 1.0) for gap, norm in norms.values())


def apart(a: Mapping[Any, torch.Tensor], b: Mapping[Any, torch.Tensor]) -> float:
    """Relative distance ‖a − b‖/‖b‖ of two sets of tensors of the same names, all together.

    For runs that round differently: Adam makes whole steps out of the rounding of gradients that are zero.
    """
    assert a.keys() == b.keys()
    gap = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (gap / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5


def greys(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Share of equal values, and largest difference in grey levels, of two sets of 8-bit images."""
    gap = np.abs(a.astype(int) - b.astype(int))
    return float((gap == 0).mean()), int(gap.max())
