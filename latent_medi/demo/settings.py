"""Settings of the demo's cohort; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_medi.core.paths import PathText
from latent_medi.core.settings import Settings


@dataclass(frozen=True)
class CohortSettings(Settings):
    """Size of the demo's cohort.

    Args:
        seed: Seed of everything drawn.
        patches_per_patient: Patches of each patient.
        probe_patients: Patients per class × site cell for linear probes and the oracle.
        test_patients: Patients per class × site cell for testing.
        train_patients: Patients per class × site cell to train on, none held out, as many frozen as elsewhere;
            0 for the skewed cohort in which combinations are held out.
        scale: Factor on the number of patients, for quick tests.
    """

    seed: int = 0
    patches_per_patient: int = 5
    probe_patients: int = 24
    test_patients: int = 28
    train_patients: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class CohortFolderSettings(CohortSettings):
    """The demo's cohort as a dataset folder.

    Args:
        out: Dataset folder to write.
        processes: Processes that draw patches; 0 means one per core.
    """

    COMMON: ClassVar = "out seed scale processes"
    EXAMPLES: ClassVar = (
        "latent-medi shards demo",
        "latent-medi shards demo out=small scale=0.2",
    )

    out: PathText = "runs/demo-data"
    processes: int = 0
