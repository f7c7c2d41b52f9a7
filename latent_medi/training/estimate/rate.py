"""Images per second of a network: on this machine from a few real updates, or on a card that is named."""

from __future__ import annotations

from dataclasses import dataclass, replace

from latent_medi.metadata.schema import Schema
from latent_medi.training.estimate.measured import read_measured
from latent_medi.training.estimate.report import (
    CARDS,
    PRESET_SHAPE,
    device_batch,
    measure,
    operations_per_second,
    unknown_card,
)
from latent_medi.training.estimate.step_cost import step_cost
from latent_medi.training.settings import EstimateSettings

_MOST_UPDATES = 100


def training_rate(
    settings: EstimateSettings, shape: tuple[int, int, int], schema: Schema | None, device: str, budget: float = 6.0
) -> float:
    """Images per second of one process.

    On a GPU whole updates are made, and on a CPU too where one takes less than half the budget. Where it takes longer,
    perhaps minutes, updates of one image and of as many as the budget allows give the time that every update takes, a,
    and that of an image, c: seconds = a + c·images.

    Args:
        settings: The run; ``processes`` share its global batch.
        shape: (C, h, w) of a latent.
        schema: The model's fields, or ``None``.
        device: "cpu" or "cuda".
        budget: Seconds of the larger updates on a CPU, about.
    """
    share = max(settings.global_batch // settings.processes, 1)
    if device.startswith("cuda"):
        batch = device_batch(settings, settings.processes)
        return measure(settings, shape, schema, batch, device)["steps_per_s"] * share

    def seconds(images: int, steps: int) -> float:
        tried = replace(settings, global_batch=images, device_batch=images, processes=1, measure_steps=steps)
        return 1 / measure(tried, shape, schema, images, device, warm=1)["steps_per_s"]

    one = seconds(1, 2)
    count = min(device_batch(settings, settings.processes), int(budget / 2 / one))
    if count < 2:
        return 1 / one
    several = seconds(count, 1)
    if several < budget / 2:
        several = seconds(count, min(_MOST_UPDATES, int(budget / several)))
    if count == share:
        return share / several
    # Where small batches cost as much as larger ones, the line would fall; half the mean time is the least slope.
    each = max((several - one) / (count - 1), several / count / 2)
    fixed = max(several - each * count, 0.0)
    return share / (fixed + each * share)


@dataclass(frozen=True)
class CardRate:
    """Images per second.

    Args:
        images_per_second: Of all processes.
        origin: "here", the name of a GPU on which training was measured, or "estimate" for one from the card's speed.
    """

    images_per_second: float
    origin: str


def card_rate(
    settings: EstimateSettings, shape: tuple[int, int, int], schema: Schema | None, evaluations: int = 0
) -> CardRate | None:
    """Images per second on the card that the settings name: as measured, else from its operations per second.

    Args:
        settings: The run, its card and processes.
        shape: (C, h, w) of a latent.
        schema: The model's fields, or ``None``.
        evaluations: Of the network for one sample; 0 for training. Sampling was measured on no card.

    Raises:
        UserError: The card is not known.
    """
    words = settings.card.lower().replace(" ", "")
    if not evaluations and shape == PRESET_SHAPE and not settings.init_from:
        for row in read_measured():
            same = (row.network, row.precision, row.compile) == (
                settings.model.preset,
                settings.precision,
                settings.compile,
            )
            if same and words in row.card.lower().replace(" ", ""):
                return CardRate(row.images_per_second * settings.processes, row.card)
    if settings.card not in CARDS:
        raise unknown_card(settings.card)
    batch = device_batch(settings, settings.processes)
    cost, _ = step_cost(settings, shape, schema, batch)
    speed = operations_per_second(settings, settings.card, CARDS[settings.card][1])
    work = evaluations * cost.forward_flops / batch if evaluations else cost.flops / batch
    return CardRate(speed / work * settings.processes, "estimate")
