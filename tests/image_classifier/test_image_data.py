"""Which patches an image classifier is trained on, in which order, and what happens to them on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import put_index

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.image_classifier import augment
from latent_medi.image_classifier.augment import Augmentation
from latent_medi.image_classifier.data import ImageData, open_parts
from latent_medi.image_classifier.settings import AugmentSettings, ImageClassifierSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.data import training_rows

Make = Callable[..., ImageClassifierSettings]


def batch(
    data: ImageData, number: int = 3, rank: int = 0, processes: int = 1, size: int = 8
) -> dict[int, torch.Tensor]:
    """Image and target at each place of the run."""
    share = data.batch(number, size, 0, 0, None, rank, processes)
    (part,) = share.parts(size, torch.device("cpu"))
    return {
        place: torch.cat([image.flatten(), target])
        for place, image, target in zip(share.places.tolist(), part.images, part.targets, strict=True)
    }


def test_two_processes_see_what_one_sees(make: Make) -> None:
    strong = AugmentSettings(erase=1.0)
    data = open_parts(make(augment=strong)).data
    for number in (0, 3):
        whole, halves = batch(data, number), batch(data, number, 0, 2) | batch(data, number, 1, 2)
        assert sorted(whole) == sorted(halves) == list(range(8 * number, 8 * number + 8))
        assert all(torch.equal(whole[place], halves[place]) for place in whole)
    plain = batch(open_parts(make(augment=replace(strong, mixup=0.0, cutmix=0.0, erase=0.0))).data)
    assert not any(torch.equal(plain[place], batch(data)[place]) for place in plain)


def test_helper_processes_change_nothing_and_global_generators_stay(make: Make) -> None:
    data = open_parts(make()).data
    helped = open_parts(make()).data
    helped.workers, helped.updates = 2, 5
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    for number in (2, 2, 3, 4):  # the first once more, as when several processes settle
        ours, theirs = batch(data, number), batch(helped, number)
        assert all(torch.equal(ours[place], theirs[place]) for place in ours)
    helped.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]


def test_a_batch_that_a_thread_makes_ahead_does_not_change_how_another_is_mixed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_parts(make(augment=AugmentSettings(erase=1.0))).data
    wanted, seeding, seed = batch(data, 1), threading.Event(), augment._seed
    ahead = threading.Thread(target=lambda: data.batch(2, 8, 0, 0, None, 0, 1))

    def seed_slowly(*arguments: Any) -> None:
        seed(*arguments)
        if threading.current_thread() is not ahead and seeding.is_set():
            ahead.join(0.2)  # long enough for it to draw, if it may

    share = data.batch(1, 8, 0, 0, None, 0, 1)
    monkeypatch.setattr(augment, "_seed", seed_slowly)
    seeding.set()
    ahead.start()
    (part,) = share.parts(8, torch.device("cpu"))
    ahead.join()
    for place, image, target in zip(share.places.tolist(), part.images, part.targets, strict=True):
        assert torch.equal(torch.cat([image.flatten(), target]), wanted[place])


def test_a_damaged_patch_stops_with_its_name_also_in_a_helper(tissue: Path, make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    for path in [*tissue.glob("*.*"), *tissue.glob("data/*")]:
        (folder / path.relative_to(tissue)).write_bytes(path.read_bytes())
    dataset = PatchDataset.open(folder)
    rows = training_rows(dataset, "main", "train", {})
    for shard in sorted((folder / "data").iterdir()):
        content = bytearray(shard.read_bytes())
        for offset, size in dataset.index.loc[
            dataset.index["shard"] == f"data/{shard.name}", ["offset", "size"]
        ].values:
            content[offset + size // 2] ^= 1
        shard.write_bytes(content)
    data = open_parts(make(data=str(folder))).data
    assert len(data) == len(rows)
    for workers in (0, 1):
        data.workers, data.updates = workers, 1
        with pytest.raises(UserError, match="checksum"):
            data.batch(0, 8, 0, 0, None, 0, 1)


def test_every_patch_once_per_epoch_and_repeats_in_a_row(make: Make) -> None:
    once, thrice = open_parts(make()).data, open_parts(make(augment=AugmentSettings(repeats=3))).data
    n = len(once)
    assert n == 192
    assert sorted(np.concatenate([once.at(i, 8, 0) for i in range(n // 8)]).tolist()) == list(range(n))
    seen = np.concatenate([thrice.at(i, 8, 0) for i in range(3 * n // 8)])
    assert (seen.reshape(-1, 3) == seen[::3, None]).all()
    assert sorted(seen[::3].tolist()) == list(range(n))


def test_normalised_patches_and_smoothed_targets_by_hand(make: Make) -> None:
    still = AugmentSettings((1.0, 1.0), 0.0, 0.0, "", 0.0, 0.0, 0.0, 0.0, 0.3)
    parts = open_parts(make(augment=still))
    how = parts.data.augmentation.preprocessing
    positions = parts.data.at(0, 8, 0)
    found = batch(parts.data, 0)
    for place, position in enumerate(positions.tolist()):
        patch = parts.dataset.read([int(parts.data.rows[position])])[0] / 255.0
        image = found[place][:-3].reshape(3, 64, 64).permute(1, 2, 0).numpy()
        # timm takes one crop of the patch's own size, if the ratio of its sides allows.
        if np.allclose(image * how.std + how.mean, patch, atol=1e-5):
            break
    else:
        pytest.fail("no patch came through unchanged")
    target = found[0][-3:].tolist()
    assert sorted(target) == pytest.approx([0.1, 0.1, 0.8])
    assert int(np.argmax(target)) == parts.data.labels[positions[0]]


def test_mixup_is_that_of_the_paper(make: Make) -> None:
    mixing = AugmentSettings((1.0, 1.0), 0.0, 0.0, "", 0.0, 0.0, 1.0, 0.0, 0.0)
    how = open_parts(make()).data.augmentation.preprocessing
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 64, 64, 3).contiguous() * 60
    labels = torch.tensor([0, 1, 2, 0])
    mixed = Augmentation(mixing, how, 3, 0).finish(images, labels, np.arange(4), 5)
    share = float(mixed.targets[0, 0]) if float(mixed.targets[0, 0]) < 1 else 0.5
    # Zhang et al. 2018 (arXiv 1710.09412): λ x_i + (1 − λ) x_j and the same of the labels, j from the other end.
    weight = float(mixed.targets[1, 1])
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[
        :, None, None
    ]
    torch.testing.assert_close(mixed.images[1], weight * pixels[1] + (1 - weight) * pixels[2])
    torch.testing.assert_close(mixed.targets[1], torch.tensor([0.0, weight, 1 - weight]))
    assert 0 < weight < 1
    assert share <= 1


def test_the_strongest_posterisation_keeps_a_bit(make: Make) -> None:
    strongest = AugmentSettings((1.0, 1.0), 0.0, 0.0, "rand-m10-n1-inc1", 0.0, 0.0, 0.0, 0.0, 0.0)
    how = open_parts(make()).data.augmentation.preprocessing
    augmentation, patch = Augmentation(strongest, how, 3, 0), np.arange(64 * 64 * 3, dtype=np.uint32) % 251
    for place in range(150):  # one of 15 changes each
        changed = augmentation.image(patch.astype(np.uint8).reshape(64, 64, 3), place)
        assert changed.shape == (64, 64, 3)


def test_synthetic_patches_by_class_best_first_or_at_random(make: Make, synthetic: PatchDataset) -> None:
    def added(**values: object) -> tuple[dict[str, int], list[int]]:
        settings = make(synthetic={"medi": str(synthetic.folder)}, only={"site": sites}, **values)
        parts = open_parts(settings)
        extra = parts.data.source == 1
        rows = parts.data.rows[extra].tolist()
        labels = [parts.labels[code] for code in parts.data.labels[extra].tolist()]
        assert labels == synthetic.index["class"].astype(str).iloc[rows].tolist()
        return {label: labels.count(label) for label in parts.labels}, rows

    sites = [str(synthetic.index["site"].iloc[0])]
    real = open_parts(make(only={"site": sites}))
    counts = np.bincount(real.data.labels, minlength=3).tolist()
    assert added(percent=50.0)[0] == dict(zip(real.labels, (n // 2 for n in counts), strict=True))
    assert added(percent=0.0)[1] == []
    best, rows = added(percent=25.0, selection="best")
    assert all(row % 2 == 0 for row in rows)
    for label, n in best.items():
        of_class = [r for r in range(0, len(synthetic), 2) if str(synthetic.index["class"].iloc[r]) == label]
        assert [r for r in rows if str(synthetic.index["class"].iloc[r]) == label] == of_class[::-1][:n]
    control, others = added(percent=25.0, selection="best", choice="random")
    assert control == best
    assert all(row % 2 == 1 for row in others)
    assert others != added(percent=25.0, selection="best", choice="random", seed=1)[1]
    with pytest.raises(UserError, match="no selection 'bets'; closest: 'best'"):
        added(selection="bets")


def test_too_few_synthetic_patches_are_said(
    make: Make, synthetic: PatchDataset, caplog: pytest.LogCaptureFixture
) -> None:
    parts = open_parts(make(synthetic={"medi": str(synthetic.folder)}, percent=1000.0))
    assert "too few patches of glandular" in caplog.text
    assert int((parts.data.source == 1).sum()) == parts.info["synthetic_patches"]["medi"]


def test_synthetic_patches_of_another_scale_are_warned_of_and_real_ones_refused(
    make: Make, tissue: Path, synthetic: PatchDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "coarse"
    folder.mkdir()
    (folder / "data").symlink_to(synthetic.folder / "data")
    (folder / "index.parquet").write_bytes((synthetic.folder / "index.parquet").read_bytes())
    info, _ = read_sealed(synthetic.folder / "dataset.json", "")
    for mpp, warned in ((info["mpp"], False), (2 * info["mpp"], True)):
        write_sealed(folder / "dataset.json", {**info, "mpp": mpp})
        open_parts(make(synthetic={"medi": str(folder)}))
        assert ("tissue has another size" in caplog.text) == warned
    with pytest.raises(UserError, match="holds real patches"):
        open_parts(make(synthetic={"medi": str(tissue)}))


def test_synthetic_patches_never_choose_or_score(tissue: Path, make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tissue.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    index = PatchDataset.open(folder).index
    put_index(folder, index.assign(origin=np.where(index["split_main"] == "probe", "synthetic", "real")))
    with pytest.raises(UserError, match=r"'probe' of .* holds synthetic patches"):
        open_parts(make(data=str(folder)))
