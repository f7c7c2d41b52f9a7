"""Weights that a command needs: where they are from, and whether they are on this machine. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Weights of a network.

    Args:
        name: As the settings name them.
        hub_id: Repository of the Hugging Face hub that they are downloaded from; empty for a file or folder.
        found: Whether they are on this machine.
        remedy: What to do if they are not, as a sentence.
    """

    name: str
    hub_id: str
    found: bool
    remedy: str = ""

    @property
    def text(self) -> str:
        """Name, origin and whereabouts, as a phrase."""
        origin = f" ({self.hub_id} of the Hugging Face hub)" if self.hub_id and self.hub_id != self.name else ""
        return f"{self.name}{origin}: {'on this machine' if self.found else 'not on this machine'}"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name`` of a hub id, and is no path by its beginning."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def in_hub_cache(hub_id: str, files: Sequence[str]) -> bool:
    """Whether one of some files of a repository is in the cache of the hub's client."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files)


def offline() -> bool:
    """Whether the hub's client may not use a connection."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)
