"""What an experiment will cost, told before it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from experiment_parts import NETWORK, TO_SAMPLE, small_experiment

from latent_medi import doctor
from latent_medi.cli import main
from latent_medi.core.config import build, load
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_json
from latent_medi.core.hub import Weights
from latent_medi.demo import cohort
from latent_medi.demo.settings import CohortSettings
from latent_medi.experiment import cost as costing
from latent_medi.experiment import limits, nodes
from latent_medi.experiment.cost import experiment_cost
from latent_medi.experiment.cost_records import ExperimentCost, cost_text
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.launching import Launching
from latent_medi.experiment.limits import check_limits
from latent_medi.experiment.nodes import run_launched
from latent_medi.experiment.rates import Placement, Rates, TrainTrial, measure_rates, rate_of, seconds_to_start
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import OPTIONAL_STAGES, STAGES, ExperimentSettings
from latent_medi.shards.dataset import PatchDataset


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., ExperimentSettings]:
    """Makes settings of an experiment on a tiny dataset, given changes."""

    def make(**values: Any) -> ExperimentSettings:
        own = {
            "stages": TO_SAMPLE,
            "train": {"max_steps": 3, "model": NETWORK, "checkpoint_every_images": 16},
            "seen_per_cell": 3,
            "generate": {"sampler": {"steps": 2}, "device_batch": 4, "patches_per_shard": 5},
        }
        return small_experiment(tmp_path, **own | values)

    return make


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Rates that stand for measured ones: 2 images per second of everything, unless a test changes them."""
    known: dict[str, float] = {}
    monkeypatch.setattr(
        costing, "measure_rates", lambda trials, _: Rates({key: known.get(key, 2.0) for key in trials}, 0.0)
    )
    return known


def cost_of(settings: ExperimentSettings, measure: bool = False) -> ExperimentCost:
    """The cost of an experiment that nothing is known of yet."""
    experiment = Experiment(settings)
    declare(experiment)
    return experiment_cost(experiment, measure=measure)


def test_a_dry_run_names_a_wrong_field_before_it_measures(
    settings: Callable[..., ExperimentSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costing, "measure_rates", lambda *_: pytest.fail("measured first"))
    with pytest.raises(UserError, match="no field 'hospital'"):
        run(settings(dry_run=True, site_field="hospital", stages=[*TO_SAMPLE, "evaluate"]))


@pytest.mark.slow
def test_images_and_bytes_are_those_of_the_run(settings: Callable[..., ExperimentSettings]) -> None:
    asked = settings()
    told = {(row.stage, row.model): row for row in cost_of(asked).stages}
    run(asked)
    out = Path(asked.out)

    def tensors(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    assert told["encode", ""].bytes == tensors(out / "latents")
    assert told["encode", ""].images == len(PatchDataset.open(asked.data))
    for name in ("medi", "cls"):
        assert told["train", name].bytes == tensors(out / name)
        assert (
            told["train", name].images
            == json.loads((out / name / "model" / "provenance.json").read_text())["images_seen"]
        )
        made = PatchDataset.open(out / "synthetic" / name)
        assert told["sample", name].images == len(made)
        assert not told["sample", name].exact
    after = cost_of(asked)
    assert all(row.finished for row in after.stages)
    assert (after.bytes, after.seconds) == (0, 0)
    assert after.planned == {"medi": 12, "cls": 12}


def test_a_dry_run_tells_all_and_writes_nothing(
    settings: Callable[..., ExperimentSettings],
    rates: dict[str, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates["train medi"], rates["train cls"] = 0.01, 0.02
    words = [f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "stages=[shards, encode, train, plan, sample]"]
    words += ["train={max_steps: 3}", "seen_per_cell=3", "dry_run=true", "parallel=2"]
    settings()
    assert main(["run", *words, "--json", str(tmp_path / "cost.json")]) == 0
    assert not (tmp_path / "out").exists()
    told, text = json.loads((tmp_path / "cost.json").read_text()), capsys.readouterr().out
    assert told["planned"] == {"medi": 12, "cls": 12}
    rows = {(row["stage"], row.get("model", "")): row for row in told["stages"]}
    # 3 updates of 16 images; both models at the same time, so the longer one counts.
    assert rows["train", "medi"]["seconds"] == pytest.approx(48 / 0.01)
    encoding = (52 + 2 * 52) / 2
    assert told["seconds"] == pytest.approx(48 / 0.01 + 12 / 2 + encoding)
    assert "train" in text
    assert "1.3  measured here" in text
    assert "disk, results" not in text
    assert told["bytes"] == sum(row.get("bytes", 0) for row in told["stages"])


def test_what_is_to_be_made_again_is_left(settings: Callable[..., ExperimentSettings], rates: dict[str, float]) -> None:
    """Models of a shorter run go on, those of other settings are refused, or with replace=true trained again: none is
    finished."""

    def trained(max_steps: int, **train: float) -> set[bool]:
        asked = settings(train={"max_steps": max_steps, "model": NETWORK, **train})
        return {row.finished for row in cost_of(asked, measure=True).stages if row.stage == "train"}

    experiment = Experiment(settings(train={"max_steps": 3, "model": NETWORK}))
    declare(experiment)
    made_from = experiment.stages._made_from("train")
    write_json(experiment.folder / "stages" / "train.json", {"made_from": made_from, "seconds": None})
    for name in ("medi", "cls"):
        (experiment.folder / name / "model").mkdir(parents=True)
    assert trained(3) == {True}
    assert trained(4) == trained(3, lr=0.5) == {False}
    asked = settings(train={"max_steps": 3, "model": NETWORK, "lr": 0.5}, dry_run=True)
    with pytest.raises(UserError, match=r"made from other inputs: train\.medi\.lr was .*, is 0\.5"):
        run(asked)
    assert run(replace(asked, replace=True))["seconds"] > 0


def test_all_gpus_take_part_in_every_stage(
    settings: Callable[..., ExperimentSettings], rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    experiment = Experiment(settings(stages=[*TO_SAMPLE, "evaluate"]), Launching(8))
    declare(experiment)
    rows = {row.stage: row for row in experiment_cost(experiment, measure=True).stages}
    for stage in ("evaluate", "sample"):
        images = rows[stage].images
        assert images
        assert rows[stage].seconds == pytest.approx(images * (2 if stage == "evaluate" else 1) / 2 / 8)


def test_rates_are_measured_with_the_threads_that_a_stage_has(
    settings: Callable[..., ExperimentSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that run at the same time share the cores, in the measurement as in the run; others have them all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 4)
    monkeypatch.setattr(costing, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def placed(where: Launching, **values: Any) -> dict[str, Placement]:
        found: dict[str, Placement] = {}

        def noted(trials: Any, placements: Any) -> Rates:
            found.update({key.strip(): placements[key] for key in trials})
            return Rates({}, 0.0)

        monkeypatch.setattr(costing, "measure_rates", noted)
        experiment = Experiment(settings(stages=TO_SAMPLE, **values), where)
        declare(experiment)
        experiment_cost(experiment, measure=True)
        return found

    two = placed(Launching())
    assert two["encode"] == Placement(1, 4)
    assert two["train medi"] == two["sample cls"] == Placement(2, 2)
    assert set(placed(Launching(), parallel=1).values()) == {Placement(1, 4)}
    one = placed(Launching(), models={"medi": {"config": "demo/medi"}})
    assert one["train medi"] == one["sample medi"] == Placement(1, 4)
    after = {"medi": {"config": "demo/medi"}, "more": {"config": "demo/medi", "init_from": "medi"}}
    assert placed(Launching(), models=after)["train more"] == Placement(1, 4)  # trained one after the other
    assert placed(Launching(), models=after)["sample more"] == Placement(2, 2)
    assert set(placed(Launching(2)).values()) == {Placement(2, 2)}

    # The same as the commands themselves are given.
    given: list[tuple[int, int | None]] = []
    monkeypatch.setattr(nodes, "run_in_parallel", lambda commands, threads: given.append((len(commands), threads)))
    for names in (["encode"], ["medi", "cls"]):
        run_launched({name: [] for name in names}, Launching())
    assert given == [(1, 4), (2, 2)]
    # Whoever sets the threads of a process means every process.
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given.clear()
    for names in (["encode"], ["medi", "cls"]):
        run_launched({name: [] for name in names}, Launching())
    assert given == [(1, 3), (2, 3)]
    assert placed(Launching())["train medi"] == Placement(2, 3)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system ties no process to cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    program = (
        "import os\n"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "os.environ.pop('OMP_NUM_THREADS', None)\n"
        "from latent_medi.experiment.launching import Launching\n"
        "from latent_medi.experiment.nodes import cores_shared\n"
        "print(Launching().threads, cores_shared(2))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "(1,", "1)"]


def test_the_encoder_of_previews_is_needed(settings: Callable[..., ExperimentSettings]) -> None:
    previews = {"preview_every_images": 16, "preview_encoder": "uni"}
    asked = settings(train={"max_steps": 3, "model": NETWORK, **previews})
    found = {weights.name: weights.found for weights in cost_of(asked).weights}
    assert found["uni"] is False
    with pytest.raises(UserError, match="uni"):  # before the hours of encoding
        run(asked)
    assert not (Path(asked.out) / "latents").exists()


def test_models_one_after_the_other_add_up(
    settings: Callable[..., ExperimentSettings], rates: dict[str, float]
) -> None:
    rates["train medi"], rates["train cls"] = 0.01, 0.02
    taken = {n: cost_of(settings(parallel=n), measure=True).seconds for n in (1, 2)}
    # 3 updates of 16 images each, and 12 samples each.
    assert taken[1] - taken[2] == pytest.approx(48 / 0.02 + 12 / 2)


def test_more_images_than_real_ones_have_to_be_named(settings: Callable[..., ExperimentSettings]) -> None:
    """The default plan of a dataset with many sites asks for millions of images."""
    told = cost_of(settings(seen_per_cell=5000))
    assert told.planned == {"medi": 20_000, "cls": 20_000}
    assert told.training_patches == 48
    with pytest.raises(UserError, match=r"medi asks for 20,000 images, and 48 patches are real(.|\n)*max_images=20000"):
        check_limits(settings(), told)
    check_limits(settings(max_images=20_000), told)
    with pytest.raises(UserError, match="more than max_images=19,999"):
        check_limits(settings(max_images=19_999), told)
    check_limits(settings(), cost_of(settings(seen_per_cell=2500)))  # 10,000 take little, however few are real
    made = replace(told, stages=[replace(row, finished=True) for row in told.stages])
    check_limits(settings(), made)
    check_limits(settings(), replace(told, training_patches=30_000))


def test_a_run_is_refused_before_anything_is_made(
    settings: Callable[..., ExperimentSettings], rates: dict[str, float]
) -> None:
    for values, why in (({"seen_per_cell": 5000}, "max_images"), ({"max_hours": 0.01}, "max_hours=0.01")):
        asked = settings(**values)
        with pytest.raises(UserError, match=why):
            run(asked)
        assert not (Path(asked.out) / "stages").exists()
        assert not (Path(asked.out) / "latents").exists()


def test_the_hours_of_a_card_are_told_without_measuring(settings: Callable[..., ExperimentSettings]) -> None:
    told = cost_of(settings(card="h100"))
    rows = {(row.stage, row.model): row for row in told.stages}
    assert told.machine == "the card h100"
    assert rows["train", "medi"].measured == "estimate"
    assert 0 < rows["train", "medi"].seconds < 1  # type: ignore[operator]
    assert told.not_measured == ["encode"]
    assert told.seconds == pytest.approx(sum(row.seconds or 0 for row in told.stages))  # one model after the other
    assert "estimated from the card's speed, not measured" in cost_text(told)
    with pytest.raises(UserError, match="h100"):
        cost_of(settings(card="h101"))


def test_what_is_missing_is_listed(
    settings: Callable[..., ExperimentSettings],
    rates: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    values = {
        "data": "",
        "recipe": "prostate",
        "source": str(tmp_path / "nowhere"),
        "patch_size": 256,
        "autoencoder": "sd-vae-ft-mse",
        "encoders": ["uni", "squeezenet"],
        "stages": [name for name in STAGES if name not in OPTIONAL_STAGES],
    }
    told = cost_of(settings(**values))
    assert [row.images for row in told.stages if row.stage == "encode"] == [None]
    assert [row.images for row in told.stages if row.stage == "train"] == [48, 48]
    missing = "\n".join(told.missing)
    for word in ("nowhere", "sd-vae-ft-mse", "huggingface.co/MahmoodLab/UNI", "weights.squeezenet"):
        assert word in missing
    assert Weights("uni", "MahmoodLab/UNI", False).name in [weights.name for weights in told.weights]
    monkeypatch.setattr(costing, "offline", lambda: False)  # with a connection, the hub's are fetched
    assert all("sd-vae" not in text for text in cost_of(settings(**values)).missing)
    words = [f"source={tmp_path / 'nowhere'}", "recipe=prostate", f"out={tmp_path / 'x'}", "dry_run=true"]
    assert main(["run", *words, "--json", str(tmp_path / "cost.json")]) == 3
    assert "nowhere" in capsys.readouterr().err
    assert any("nowhere" in text for text in json.loads((tmp_path / "cost.json").read_text())["missing"])


def test_a_dry_run_says_what_the_machine_lacks(
    settings: Callable[..., ExperimentSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings()
    monkeypatch.setattr(doctor, "LEAST_FREE", 2**62)
    words = [f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "stages=[shards, encode]", "dry_run=true"]
    assert main(["run", *words]) == 0
    assert "disk, results" in capsys.readouterr().out


def test_a_long_run_on_a_cpu_is_measured_and_names_what_a_cpu_can_do(
    settings: Callable[..., ExperimentSettings], rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cost_of(settings()).seconds == 0
    monkeypatch.setattr(costing.torch.cuda, "is_available", lambda: False)
    long = cost_of(settings(train={"max_images": 51_200_000, "max_steps": 0, "model": NETWORK}, parallel=2))
    assert long.seconds > 51_200_000 / 2
    note = "\n".join(long.notes)
    assert "no GPU" in note
    assert "296 days" in note
    assert "prostate/64px" in note


def test_rates_are_those_of_real_work(settings: Callable[..., ExperimentSettings]) -> None:
    """Every kind of work that is timed is done for real, on the smallest of networks."""
    asked = settings(stages=[name for name in STAGES if name not in OPTIONAL_STAGES])
    experiment = Experiment(asked)
    declare(experiment)
    whole = costing._Costing(experiment, None)
    whole.cost(measure=False)
    kinds = {key: trial for key, trial in whole.trials.items() if "cls" not in key}
    assert set(kinds) == {"encode ", "train medi", "sample medi", "evaluate demo"}
    assert seconds_to_start() > 0
    assert all(rate_of(trial, threads=1)[0] > 0 for trial in kinds.values())
    trial = kinds["train medi"]
    assert isinstance(trial, TrainTrial)
    assert rate_of(replace(trial, shape=(4, 7, 9)), threads=1)[0] == 0  # which no network takes


@pytest.mark.slow
def test_two_processes_measure_at_the_same_time(tmp_path: Path) -> None:
    found = measure_rates({"train medi": MeetsAnother(tmp_path)}, {"train medi": Placement(2, 3)})
    assert found.start > 0
    assert found.images_per_second == {"train medi": 3.0}


@dataclass(frozen=True)
class MeetsAnother:
    """Work that waits until another process does it too; its rate is the number of its threads."""

    folder: Path

    def rate(self, device: str) -> float:
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        return float(torch.get_num_threads())


class TooLarge:
    """Work for which there is no memory."""

    def rate(self, device: str) -> float:
        return float(torch.zeros(2**60)[0])


class Killed:
    """Work that ends the process that receives it."""

    def rate(self, device: str) -> float:
        return 1.0

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_hours_that_memory_is_too_small_to_measure_are_told_with_the_reason(
    settings: Callable[..., ExperimentSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, reason = rate_of(TooLarge(), threads=1)
    assert found == 0
    assert "memory" in reason
    killed = measure_rates({"train medi": Killed()}, {"train medi": Placement(1, 1)})
    assert not killed.images_per_second
    assert "killed" in killed.failed["train medi"]
    monkeypatch.setattr(costing, "measure_rates", lambda trials, _: killed)
    told = cost_of(settings(), measure=True)
    assert "train" in told.not_measured
    assert any("Hours of train medi were not measured: the process" in note for note in told.notes)


def test_the_demo_lists_what_it_will_make(tmp_path: Path) -> None:
    small = CohortSettings(seed=3, scale=0.03, patches_per_patient=2)
    told, made = cohort.listing(small), cohort.build(tmp_path / "demo", small, jobs=1)
    assert told.schema == made.schema
    assert told.counts == [shard["count"] for shard in made.info["shards"]]
    columns = ["key", "patient", "slide", *made.schema.names, "split_main"]
    assert told.index[columns].equals(made.index[columns])


def test_a_dataset_that_is_yet_to_be_made_is_counted(tmp_path: Path) -> None:
    """The demo's plan and latents are known before anything is rendered."""
    told = cost_of(build(ExperimentSettings, load(ExperimentSettings, "demo/experiment") | {"out": str(tmp_path)}))
    rows = {(row.stage, row.model): row for row in told.stages}
    assert rows["shards", ""].images == rows["encode", ""].images
    assert rows["train", "medi"].images == 27_200
    # As in the demo's own result.
    assert rows["sample", "medi"].images == rows["sample", "cls"].images
    assert told.planned["medi"] <= limits.FREE_IMAGES
