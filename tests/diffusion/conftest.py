"""The schema that the tests of the model share."""

from __future__ import annotations

import pandas as pd
import pytest

from latent_medi.metadata.schema import Schema


@pytest.fixture(scope="session")
def schema() -> Schema:
    """grade (class), site and gender (categorical), age (continuous)."""
    table = pd.DataFrame(
        {
            "grade": ["benign", "gleason3", "gleason4", "benign"],
            "site": ["karolinska", "radboud", "karolinska", "radboud"],
            "gender": ["male", "female", "unknown", "male"],
            "age": ["50", "60", "70", "unknown"],
        }
    )
    return Schema.from_table(table, "grade", ["site", "gender"], ["age"], {"age": "years"})
