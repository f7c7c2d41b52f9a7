"""Where the weights of an encoder are from, and whether they are on this machine; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.hub import Weights, in_hub_cache, offline
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
    from torch.hub import get_dir

    cached = Path(get_dir()) / "checkpoints" / entry.source
    return Weights(text, "", cached.is_file(), f"Download {entry.url}, and give weights.{name}=PATH.")


def check_encoder(text: str, weights: str = "") -> None:
    """Refuse an encoder that is not known, or whose weights are not here and cannot be downloaded, before any work.

    Args:
        text: As for :func:`encoder_weights`.
        weights: Likewise.

    Raises:
        UserError: Says what to do.
    """
    found, named = encoder_weights(text, weights), not weights and text.split("@")[0] in ENCODERS
    if found.found or (named and not (found.hub_id and offline())):  # what is not here is downloaded
        return
    if not weights and not named:
        raise UserError(f"There is no encoder {text!r}; {nearest(text, ENCODERS)}.", found.remedy)
    raise UserError(f"The weights of the encoder {text!r} are not on this machine.", found.remedy)
