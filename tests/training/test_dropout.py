"""What the denoiser is told while it trains: how often which conditions are left out, over processes and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from latent_medi.diffusion.settings import DropoutSettings
from latent_medi.metadata.schema import NULL
from latent_medi.training.data import open_data
from latent_medi.training.settings import TrainSettings


@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_drops_conditions_as_often_as_its_settings_say(
    processes: int, run_settings: Callable[..., TrainSettings]
) -> None:
    dropout = DropoutSettings(0.5, 0.1, 0.15, 0.25, 0.4)
    data = open_data(run_settings(dropout=dropout), None)
    assert data.schema is not None
    is_class = [field.kind == "class" for field in data.schema.fields]
    batch, batches = 96, 120
    shares = []
    for number in range(batches):
        parts = [data.batch(number, batch, 7, 1000, dropout, rank, processes) for rank in range(processes)]
        shares.append([part.conditions.codes != NULL for part in parts if part.conditions is not None])
    kept = [torch.cat([share[rank] for share in shares]) for rank in range(processes)]
    for each in [torch.cat(kept), *kept]:  # over the run, and in each process
        observed = Counter(map(tuple, each.tolist()))
        for subset in product((True, False), repeat=len(is_class)):
            some = dropout.independent_rate ** subset.count(False) * (1 - dropout.independent_rate) ** sum(subset)
            share = dropout.independent * some
            share += dropout.keep_all * all(subset)
            share += dropout.all_null * (not any(subset))
            share += dropout.metadata_null * (list(subset) == is_class)
            expected, spread = share * len(each), np.sqrt(len(each) * share * (1 - share))
            assert abs(observed[subset] - expected) <= 5 * spread, subset
    # No position of the batch, and no batch, has a pattern of its own.
    whole = torch.stack([torch.cat(share) for share in shares]).all(dim=2).double()
    share = dropout.keep_all + dropout.independent * (1 - dropout.independent_rate) ** len(is_class)
    for axis, count in ((0, batches), (1, batch)):
        spread = np.sqrt(share * (1 - share) / count)
        assert float((whole.mean(axis) - share).abs().max()) <= 5 * spread
        assert 0.7 * spread <= float(whole.mean(axis).std()) <= 1.3 * spread
