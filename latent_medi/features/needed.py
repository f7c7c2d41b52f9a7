"""Where the weights of an encoder are from, and whether they are on this machine; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from latent_medi.core.hub import Weights, in_hub_cache
from latent_medi.features.registry import ENCODERS, HUB_FILES, access_hint


def encoder_weights(text: str, weights: str = "") -> Weights:
    """The weights of an encoder.

    Args:
        text: As the settings name it: a name with marks ("squeezenet@128@bf16"), a folder, or ``module:callable``.
        weights: The weight file or folder that the settings give for it, if any.
    """
    name = text.split("@")[0]
    if weights:
        return Weights(text, "", Path(weights).exists(), f"{weights} does not exist: check weights.{name}.")
    if name == "demo" or name not in ENCODERS:  # a folder, or a function that brings its own
        known = name == "demo" or ":" in text or Path(text).is_dir()
        return Weights(text, "", known, "Give a name, a folder with encoder.json, or module:callable.")
    entry = ENCODERS[name]
    if entry.library in ("timm", "transformers"):
        return Weights(text, entry.source, in_hub_cache(entry.source, HUB_FILES), access_hint(entry))
    found = False
    if entry.library == "torch-fidelity":
        from torch.hub import get_dir

        found = (Path(get_dir()) / "checkpoints" / entry.source).is_file()
    return Weights(text, "", found, f"Give weights.{name}=PATH: {entry.source} of {entry.library}.")
