"""What all recipes share: the options of their ``build``, and their command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from latent_medi.core.paths import path_argument
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import CODECS
from latent_medi.shards.settings import Codec


class Options(TypedDict, total=False):
    """What every recipe's ``build`` takes besides its folders and the patch size.

    Args:
        codec: ``png`` (default), ``jpg`` or ``webp``.
        seed: Seed of the split, 0 by default; without effect where the split is the published one.
        jobs: Processes or threads, 1 by default.
        allow_duplicates: Patients whose pictures may be in several parts of the split; ``["*"]`` for all.
    """

    codec: Codec
    seed: int
    jobs: int
    allow_duplicates: Sequence[str]


def import_options(out: Path, patch_size: int, options: Options) -> dict[str, Any]:
    """The options as entries of :class:`~latent_medi.shards.settings.ImportSettings`."""
    shared = {name: value for name, value in options.items() if name != "seed"}
    return {"out": str(out), "patch_size": patch_size, **shared}


def recipe_parser(
    name: str, document: str | None, source: str, patch_size: int, jobs: str = "processes", published_split: bool = True
) -> argparse.ArgumentParser:
    """A parser of the words that every recipe takes; their names are those of its ``build``'s arguments.

    Args:
        name: The recipe's name.
        document: Its docstring; the first line is shown in the help.
        source: What the source folder holds, for the help.
        patch_size: Default edge of a stored patch in pixels.
        jobs: The unit of ``--jobs``.
        published_split: Whether the recipe records a split, in which duplicates may be allowed.
    """
    parser = argparse.ArgumentParser(prog=f"latent-medi shards {name}", description=(document or "").split("\n")[0])
    parser.add_argument("source", type=path_argument, help=source)
    parser.add_argument("out", type=path_argument, help="dataset folder to write")
    size = f"edge of a stored patch in pixels (default {patch_size})"
    parser.add_argument("--patch-size", type=int, default=patch_size, help=size)
    parser.add_argument("--codec", choices=CODECS, default="png", help="png is lossless (default)")
    parser.add_argument("--jobs", type=int, default=1, help=f"{jobs} (default 1)")
    if published_split:
        allow = "whose pictures may be in several parts of the split under different patients; '*' for all"
        parser.add_argument("--allow-duplicates", nargs="+", default=[], metavar="PATIENT", help=allow)
    return parser


def run_recipe(
    build: Callable[..., PatchDataset],
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    split: str = "",
    counts: tuple[str, ...] = ("class", "site", "patients"),
) -> dict[str, Any]:
    """Build a dataset from command-line words, and print counts by two of its columns.

    Args:
        build: The recipe's function.
        parser: From :func:`recipe_parser`.
        words: Command-line words; ``None`` for those of this process.
        split: Name of the split whose counts are returned.
        counts: Columns and unit of the printed table.

    Returns:
        ``folder``, ``patches`` and, with a split, ``splits``: its counts by part.
    """
    dataset = build(**vars(parser.parse_args(words)))
    print(dataset.counts(*counts).to_string())
    result = {"folder": str(dataset.folder), "patches": len(dataset)}
    return result | ({"splits": dataset.info["splits"][split]["counts"]} if split else {})
