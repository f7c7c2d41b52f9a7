"""Numbers that others can check: FID and KID against torch-fidelity's, and neighbourhoods counted one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_medi.core.records import encode
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.features.encoders import load_encoder
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.statistics.distances import frechet_distance
from latent_medi.statistics.kernel_distance import kid

SCHEMA = Schema((Field("class", "class", ("a", "b")), Field("site", "categorical", ("x", "y"))))
SIZE = 64


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity's, with random weights that keep the features' spread through the depth."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: object, *_: object) -> None:  # type: ignore[override]
            """There is nothing to load yet."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Blank("blank", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "weights-inception-random.pth")
    return folder / "weights-inception-random.pth"


def _images(count: int, seed: int, contrast: float) -> Iterator[np.ndarray]:
    """Smooth random colour, uint8 [64, 64, 3]."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = rng.normal(0.6, contrast, (1, 3, 8, 8))
        fine = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=SIZE, mode="bicubic")[0]
        noisy = fine.permute(1, 2, 0).numpy() + rng.normal(0, 0.05, (SIZE, SIZE, 3))
        yield np.rint(255 * noisy.clip(0, 1)).astype(np.uint8)


def _theirs(folder: Path, real: list[np.ndarray], made: list[np.ndarray], weights: Path) -> dict[str, float]:
    """torch-fidelity's numbers of the same images, one PNG file each."""
    import torch_fidelity

    for name, images in (("real", real), ("made", made)):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i:04d}.png")
    return torch_fidelity.calculate_metrics(
        input1=str(folder / "made"), input2=str(folder / "real"), fid=True, kid=True, cuda=False, verbose=False,
        kid_subset_size=max(2, len(real) // 2), batch_size=50, cache=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip


def _patches(images: list[np.ndarray], split: str, tumour: str, site: str, made: bool = False) -> Iterator[Patch]:
    for i, image in enumerate(images):
        patient = f"synthetic:abc:{i // 5}" if made else f"{split}-{tumour}{site}-{i // 5}"
        yield Patch(f"{split}-{tumour}{site}-{i}", image, patient, patient, i, 0, 0.5,
                    {"class": tumour, "site": site}, origin="synthetic" if made else "real")  # fmt: skip


@pytest.mark.slow  # a random Inception on three sets of images, twice
@pytest.mark.parametrize("count", [24, 200])
def test_the_papers_protocol_gives_torch_fidelitys_numbers(inception: Path, tmp_path: Path, count: int) -> None:
    real, made = list(_images(count, 1, 0.12)), list(_images(count, 2, 0.16))
    few = list(_images(40, 3, 0.12))
    patches = [
        *_patches(few[:10], "train", "a", "x"), *_patches(few[10:20], "train", "b", "x"),
        *_patches(few[20:30], "train", "b", "y"), *_patches(few[30:], "probe", "a", "y"),
        *_patches(real, "test", "a", "y"),
    ]  # fmt: skip
    split = {p.patient: p.patient.split("-")[0] for p in patches}
    write_dataset(tmp_path / "real", patches, "r", SCHEMA, SIZE, 0.5, splits={"main": (split, {"kind": "planted"})})
    write_dataset(tmp_path / "made", list(_patches(made, "s", "a", "y", made=True)), "m", SCHEMA, SIZE, 0.5)
    settings = EvaluateSettings(
        real=str(tmp_path / "real"), synthetic={"medi": str(tmp_path / "made")}, out=str(tmp_path / "out"),
        held_out=[{"class": "a", "site": "y"}], encoders=["inception"], weights={"inception": str(inception)},
        colour_free=False, protocol="paper", downstream=False, batch=50,
    )  # fmt: skip
    table = evaluate(settings).fidelity["inception"].per_class
    (found,) = [c for c in table.combinations if c.combination == {"class": "a"}]
    ours = encode(found.sources["medi"])
    assert (found.n_reference, ours["n_patches"]) == (count, count)  # every image, so both judge the same
    assert ours["fd"] is None  # fewer than 2 × 2048
    theirs = _theirs(tmp_path / "png", real, made, inception)
    assert ours["fd_raw"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["fd_raw_label"] == "rank-deficient: compare only at equal n"
    error = theirs["kernel_inception_distance_std"]
    assert abs(ours["value"] - theirs["kernel_inception_distance_mean"]) <= error
    assert error < 0.5 * ours["value"]  # an error that would hide anything shows nothing


def test_a_few_images_give_torch_fidelitys_features(inception: Path, tmp_path: Path) -> None:
    """The same pixels reach the same network: stored bytes on our way, PNG files on theirs."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = list(_images(3, 4, 0.15))
    write_dataset(tmp_path / "set", list(_patches(images, "s", "a", "y", made=True)), "m", SCHEMA, SIZE, 0.5)
    encoder = load_encoder("inception", weights=inception)
    ours = encoder.features([PatchDataset.open(tmp_path / "set").read(np.arange(3))])
    network = FeatureExtractorInceptionV3("their", ["2048"], feature_extractor_weights_path=str(inception))
    theirs = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / f"{i}.png"))).permute(2, 0, 1)
        theirs.append(network(pixels[None])[0].numpy())
    assert ours.shape == (3, 2048)
    np.testing.assert_allclose(ours, np.concatenate(theirs), rtol=1e-4, atol=1e-5 * np.abs(ours).max())
    assert np.abs(ours[0] - ours[1]).max() > 1e-3 * np.abs(ours).max()


def test_kid_lies_within_the_error_of_torch_fidelitys() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 64)), rng.normal(size=(500, 64)) * 1.2 + 0.1
    theirs = metric.kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=250, verbose=False)
    mean, error = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert abs(kid(a, b) - mean) <= error
    assert error < 0.5 * mean


def _one_by_one(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """Definitions of Kynkäänniemi et al. 2019 and Naeem et al. 2020, point by point."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    reals, fakes = [radius(real, i) for i in range(len(real))], [radius(fake, j) for j in range(len(fake))]
    holds = [[math.dist(x, y) <= r for y in fake] for x, r in zip(real, reals, strict=True)]
    held = [[math.dist(x, y) <= r for y, r in zip(fake, fakes, strict=True)] for x in real]
    return {
        "precision": sum(any(row[j] for row in holds) for j in range(len(fake))) / len(fake),
        "recall": sum(any(row) for row in held) / len(real),
        "density": sum(sum(row) for row in holds) / len(fake) / k,
        "coverage": sum(any(row) for row in holds) / len(real),
    }


def _gaussian() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(80, 6)), rng.normal(size=(80, 6)) * 0.7 + 0.4


def _lattice() -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers: many distances equal a radius, and many points coincide."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 5, (70, 3)).astype(float), rng.integers(1, 7, (70, 3)).astype(float)


def _clusters() -> tuple[np.ndarray, np.ndarray]:
    """Real patches in three places, samples in one of them and far away; 32-bit features as encoders give."""
    rng = np.random.default_rng(2)
    real = np.repeat([[0.0] * 16, [6.0] * 16, [-6.0] * 16], 30, axis=0) + rng.normal(size=(90, 16))
    fake = np.repeat([[0.0] * 16, [40.0] * 16], 45, axis=0) + 0.6 * rng.normal(size=(90, 16))
    return real.astype(np.float32), fake.astype(np.float32)


@pytest.mark.parametrize("fixture", [_gaussian, _lattice, _clusters])
@pytest.mark.parametrize("k", [3, 5])
def test_neighbourhoods_equal_a_count_one_by_one(fixture: object, k: int) -> None:
    real, fake = fixture()  # type: ignore[operator]
    found = neighbourhoods(real, fake, k=k)
    for name, expected in _one_by_one(real, fake, k).items():
        assert getattr(found, name) == expected, name
    assert found.n == len(real)


def _nuclear(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance without a covariance: tr (Σa·Σb)^½ is the sum of singular values of a product of samples."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    x, y = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross)


@pytest.mark.parametrize(("count", "dim"), [(400, 20), (90, 40), (30, 60)], ids=["many", "some", "fewer than d"])
@pytest.mark.parametrize("dead", [0, 4])
def test_frechet_equals_an_independent_float64_computation(count: int, dim: int, dead: int) -> None:
    """With features that never vary, and with fewer samples than features, where Σ is singular."""
    rng = np.random.default_rng(count)
    mix = rng.normal(size=(dim, dim)) / np.arange(1, dim + 1)
    a, b = rng.normal(size=(count, dim)) @ mix, rng.normal(size=(count + 7, dim)) @ mix * 1.1 + 0.2
    a[:, :dead] = b[:, :dead] = 0.5
    assert frechet_distance(a, b) == pytest.approx(_nuclear(a, b), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5 * np.trace(np.cov(a.T)))
