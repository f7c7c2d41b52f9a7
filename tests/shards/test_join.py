from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.settings import JoinSettings
from latent_medi.shards.writing import join as joining
from latent_medi.shards.writing.join import join
from latent_medi.shards.writing.writer import Patch, write_dataset


def cohort(
    folder: Path, start: int, race: bool = False, split: str = "main", mpp: float = 0.5, edge: int = 16
) -> PatchDataset:
    """Four patients with three patches each; numbers begin at ``start``; the second half tests."""
    draw = np.random.default_rng(start)
    patches = [
        Patch(
            key=f"k{number}-{i}",
            image=draw.integers(0, 256, (edge, edge, 3), dtype=np.uint8),
            patient=f"p{number}",
            slide=f"s{number}",
            x=i,
            y=0,
            source_mpp=0.5,
            fields={
                "class": "ab"[number % 2],
                "site": f"site{start}",
                "age": 40.5 + i if i else "unknown",
                **({"race": "m"} if race else {}),
            },
            extra={"batch_note": f"n{i}"} if race else {},
        )
        for number in range(start, start + 4)
        for i in range(3)
    ]
    columns = [patch.fields for patch in patches]
    schema = Schema.from_table(
        __import__("pandas").DataFrame(columns), "class", ["site", *(["race"] if race else [])], ["age"]
    )
    dataset = write_dataset(
        folder,
        patches,
        folder.name,
        schema,
        edge,
        mpp,
        patches_per_shard=5,
        provenance={"licence": f"licence {start}"},
    )
    parts = ["test" if int(patient[1:]) >= start + 2 else "train" for patient in dataset.index["patient"]]
    dataset.add_split(split, parts, {"kind": f"by hand, {start}"})
    return PatchDataset.open(folder)


def joined(out: Path, *folders: PatchDataset, **more: str) -> PatchDataset:
    return join(JoinSettings(out=str(out), folders=[str(dataset.folder) for dataset in folders], **more))


def pictures(dataset: PatchDataset) -> dict[str, bytes]:
    return dict(
        zip(dataset.index["key"], (image.tobytes() for image in dataset.read(range(len(dataset)))), strict=True)
    )


def test_shards_are_linked_and_schemas_and_splits_merged(tmp_path: Path) -> None:
    a, b = cohort(tmp_path / "a", 0), cohort(tmp_path / "b", 10)
    b.add_split("other", ["train"] * len(b), {"kind": "all"})
    out = tmp_path / "out"
    words = ["shards", "join", str(out), str(a.folder), str(b.folder), "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    dataset = PatchDataset.open(out)
    assert dataset.verify(images=True) == []
    assert pictures(dataset) == pictures(a) | pictures(b)
    assert dataset.schema == Schema.merge(a.schema, b.schema)
    assert dataset.schema.field("site").values == ("site0", "site10")
    for name in ("patient", "slide", "class", "site", "split_main"):
        assert dataset.index[name].tolist() == a.index[name].tolist() + b.index[name].tolist()
    assert dataset.index["split_other"].tolist() == [""] * len(a) + ["train"] * len(b)
    recipes = {name: split["recipe"] for name, split in dataset.info["splits"].items()}
    assert recipes["main"] == {"kind": "joined", "of": [{"kind": "by hand, 0"}, {"kind": "by hand, 10"}]}
    assert recipes["other"] == {"kind": "all"}
    provenance = dataset.info["provenance"]
    assert provenance["licence"] == "licence 0; licence 10"
    assert [part["name"] for part in provenance["joined"]] == ["a", "b"]
    # The same files under two names: the joined folder takes no space, and outlives the others.
    assert os.path.samefile(out / "data" / "part-000003.tar", b.folder / "data" / "part-000000.tar")
    assert json.loads((tmp_path / "out.json").read_text())["patches"] == 24
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_field_that_a_folder_lacks_is_unknown_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = cohort(tmp_path / "a", 0), cohort(tmp_path / "b", 10, race=True)
    dataset = joined(tmp_path / "out", a, b)
    assert dataset.verify(images=True) == []
    assert "a has no field race: it is unknown" in caplog.text
    assert dataset.index["race"].tolist() == ["unknown"] * 12 + ["m"] * 12
    assert dataset.index["batch_note"].tolist() == [""] * 12 + ["n0", "n1", "n2"] * 4
    ages = dataset.index["age"].to_numpy()
    assert np.array_equal(ages, np.concatenate([a.index["age"], b.index["age"]]), equal_nan=True)
    with tarfile.open(tmp_path / "out" / "data" / "part-000000.tar") as tar:
        assert json.load(tar.extractfile("k0-0.json"))["race"] == "unknown"
    assert pictures(dataset) == pictures(a) | pictures(b)


def test_patients_of_one_name_are_one_person_or_two_as_told(tmp_path: Path) -> None:
    a, b = cohort(tmp_path / "north.v1", 0), cohort(tmp_path / "south", 0, split="other")
    with pytest.raises(UserError, match=r"both have the patient 'p0' \(4 shared\)") as refused:
        joined(tmp_path / "out", a, b)
    assert "patients=separate" in refused.value.hint
    with pytest.raises(UserError, match=r"both have the key 'k0-0' \(12 shared\)"):
        joined(tmp_path / "out", a, b, patients="same")
    assert not (tmp_path / "out").exists()
    dataset = joined(tmp_path / "out", a, b, patients="separate")
    # The pictures of both are the same: two persons with one picture are found.
    assert [p for p in dataset.verify(images=True) if "picture" not in p] == []
    assert dataset.index["patient"].tolist()[::3] == [f"{f}/p{n}" for f in ("north-v1", "south") for n in range(4)]
    assert dataset.index["key"].iloc[12] == "south/k0-0"
    assert dataset.index["slide"].iloc[12] == "south/s0"
    assert dataset.info["duplicates"]["pictures"] == 12


def test_one_patient_in_two_parts_is_refused(tmp_path: Path) -> None:
    a = cohort(tmp_path / "a", 0)
    b = PatchDataset.open(make_keys(cohort(tmp_path / "b", 2), tmp_path / "c"))
    with pytest.raises(UserError, match=r"split_main: 2 patients are in more than one part: 'p2' in"):
        joined(tmp_path / "out", a, b, patients="same")


def test_slides_of_one_name_are_one_slide_or_refused(tmp_path: Path) -> None:
    a = cohort(tmp_path / "a", 0)
    again = PatchDataset.open(make_keys(a, tmp_path / "again", slide=str))
    with pytest.raises(UserError, match=r"both have the slide 's0' of patient 'p0' \(4 shared\)") as refused:
        joined(tmp_path / "out", a, again, patients="same")
    assert "slides=same" in refused.value.hint
    dataset = joined(tmp_path / "out", a, again, patients="same", slides="same")
    assert (len(dataset), dataset.index["slide"].nunique()) == (24, 4)
    # Of other patients it is another slide, whatever the settings say.
    others = PatchDataset.open(make_keys(cohort(tmp_path / "b", 10), tmp_path / "c", slide=lambda _: "s0"))
    with pytest.raises(UserError, match=r"both have the slide 's0', of the patients 'p0' and 'p13'"):
        joined(tmp_path / "two", a, others, slides="same")


def make_keys(dataset: PatchDataset, folder: Path, slide: Callable[[str], str] = "{}b".format) -> Path:
    """The dataset under other keys and names of slides, written again."""
    index = dataset.index
    patches = [
        Patch(
            f"other{row}",
            image,
            index["patient"].iloc[row],
            slide(index["slide"].iloc[row]),
            0,
            0,
            0.5,
            {name: index[name].iloc[row] for name in dataset.schema.names},
        )
        for row, image in enumerate(dataset.read(range(len(dataset))))
    ]
    made = write_dataset(folder, patches, folder.name, dataset.schema, 16, 0.5)
    for name in dataset.splits:
        made.add_split(name, index[f"split_{name}"].tolist(), {"kind": "copied"})
    return folder


def test_slides_that_only_one_folder_puts_in_a_part(tmp_path: Path) -> None:
    a = cohort(tmp_path / "a", 0)
    b = PatchDataset.open(make_keys(cohort(tmp_path / "b", 2, split="second"), tmp_path / "c"))
    dataset = joined(tmp_path / "out", a, b, patients="same")
    # p2 and p3 are in both; their slides of the second folder are in no part of the first one's split.
    assert dataset.index["split_main"].tolist() == a.index["split_main"].tolist() + [""] * 12
    assert dataset.index["split_second"].tolist() == [""] * 12 + b.index["split_second"].tolist()


@pytest.mark.parametrize("linked", [True, False])
def test_a_killed_join_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    a, b = cohort(tmp_path / "a", 0), cohort(tmp_path / "b", 10)
    whole = joined(tmp_path / "whole", a, b)
    if not linked:  # as between file systems

        def link(source: Path, target: Path) -> None:
            if Path(target).suffix == ".tar":
                raise OSError("cross-device link")
            real_link(source, target)

        real_link = os.link
        monkeypatch.setattr(joining.os, "link", link)
    done = []

    def killed(*arguments: object) -> None:
        done.append(arguments)
        if len(done) == 4:
            raise KeyboardInterrupt
        write_record(*arguments)

    write_record = joining.write_record
    with monkeypatch.context() as patched:
        patched.setattr(joining, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            joined(tmp_path / "out", a, b)
    with pytest.raises(UserError, match="is not finished"):
        PatchDataset.open(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(joining, "write_record", lambda *given: (done.append(given), write_record(*given)))
        again = joined(tmp_path / "out", a, b)
    assert len(done) == 4 + 3  # of six shards three were finished
    assert again.verify(images=True) == []
    assert not (tmp_path / "out" / ".progress").exists()
    assert again.info["index_sha256"] == whole.info["index_sha256"]
    with pytest.raises(UserError, match="is a finished dataset of other patches"):
        joined(tmp_path / "out", a, cohort(tmp_path / "d", 20))


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    a, b = cohort(tmp_path / "a", 0), cohort(tmp_path / "b", 10, mpp=1.0)
    with pytest.raises(UserError, match=r"Joined folders have one mpp, not 0.5 in .*, 1.0 in"):
        joined(tmp_path / "out", a, b)
    with pytest.raises(UserError, match="two or more to join"):
        joined(tmp_path / "out", a)
    with pytest.raises(UserError, match="A folder is named twice"):
        joined(tmp_path / "a", a, cohort(tmp_path / "c", 20))
    other = cohort(tmp_path / "d", 30, edge=32)
    with pytest.raises(UserError, match=r"one patch size, not 16 in .*, 32 in"):
        joined(tmp_path / "out", a, other)
