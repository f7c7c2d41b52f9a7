"""What there is to run: parts in order of worth, groups that share a process, rows; no torch is imported here.

Seconds are for a budget of :data:`BUDGET`; another budget scales them.
"""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 540.0

LEAST = 40.0
"""Seconds that a part gets however small the budget is, as far as they are there: a process has to start first."""


@dataclass(frozen=True)
class Group:
    """Rows that run one after another in one process.

    Args:
        module: Module whose ``ROWS`` has a function for each row.
        rows: Names of the rows, in order of worth.
        chain: Whether each row builds on the one before, so that none may be left out or moved.
    """

    module: str
    rows: tuple[str, ...]
    chain: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the whole.

    Args:
        name: Word for ``--parts``.
        seconds: Most that it may take.
        groups: In order of worth.
        at_once: Processes at the same time on a GPU with memory for them; its rows are then no timings.
    """

    name: str
    seconds: float
    groups: tuple[Group, ...]
    at_once: int = 1


_MODES = ("bf16", "fp16", "channels_last")

SMOKE = Part(
    "smoke",
    90,
    (
        Group(
            "gpu_parts.smoke_train",
            (
                "train demo fp32",
                *(f"train demo {mode}" for mode in _MODES),
                "fp16 overflow",
                "train S fp32",
                *(f"train S {mode}" for mode in _MODES),
                "resident device",
                "resident ram",
                "resident mmap",
                "accumulation",
                "previews",
                "activation checkpointing",
                "fused AdamW",
                "8-bit AdamW",
            ),
        ),
        Group("gpu_parts.smoke_resume", ("kill and resume fp32", "kill and resume bf16")),
        Group(
            "gpu_parts.smoke_make",
            (
                "autoencoder fp32",
                "autoencoder bf16",
                "autoencoder fp16",
                *(f"sampler {name}" for name in ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun", "ddim", "ddpm")),
                "evaluate",
            ),
        ),
        Group("gpu_parts.smoke_memory", ("memory full: train", "memory full: sample", "memory full: encode")),
        Group("gpu_parts.smoke_tests", ("pytest -m gpu",)),
        Group("gpu_parts.smoke_compile", ("train demo compiled", "train S compiled")),
    ),
    at_once=3,
)

REAL = Part("real", 240, (Group("gpu_parts.real", ("patches", "rate", "run", "pictures"), chain=True),))

RATES = Part(
    "rates",
    150,
    (
        Group(
            "gpu_parts.rates",
            (
                "train B compiled",
                "loops",
                "sampling",
                "encoding",
                "features",
                "train S eager",
                "train B eager",
                "train L eager",
                "train S compiled",
                "train L compiled",
                "peak 8gb",
                "peak 12gb",
                "peak 24gb",
                "peak 80gb",
                "pixels",
            ),
        ),
    ),
)

DEMO = Part("demo", 60, (Group("gpu_parts.demo", ("demo",), chain=True),))

HISTODIFFUSION = Part(
    "histodiffusion", BUDGET, (Group("gpu_parts.histodiffusion", ("patches", "rate", "run", "pictures"), chain=True),)
)

TOGETHER = (SMOKE, REAL, RATES, DEMO)
"""The parts that one budget holds."""

PARTS = (*TOGETHER, HISTODIFFUSION)
