"""Settings of the feature extraction; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from latent_medi.paths import PathText


@dataclass
class FeatureSettings:
    """How patches become feature vectors.

    Args:
        encoder: "demo", "squeezenet" (or "squeezenet@128" for another input size in pixels), "inception", "uni",
            "uni2-h", "virchow2", "h-optimus-0", "phikon", "phikon-v2", "midnight", "dinov2", a folder with an encoder,
            or module:callable for one of your own.
        weights: Weight file or folder for encoders that need one; empty means the Hugging Face hub.
        batch: Patches per forward pass.
        device: Torch device, such as "cpu" or "cuda".
        colour_free: Also embed the haematoxylin channel alone.
        cache: Folder of the feature cache; empty means inside the output folder.
    """

    encoder: PathText = "demo"
    weights: PathText = ""
    batch: int = 128
    device: str = "cpu"
    colour_free: bool = True
    cache: PathText = ""
