"""A sheet is balanced and tells nothing; its score counts what readers said, and what they did not say."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_world import World
from PIL import Image
from scipy.stats import binomtest

from latent_medi import cli
from latent_medi.core.errors import UserError
from latent_medi.report.reading_score import score_sheet
from latent_medi.report.reading_sheet import make_sheet
from latent_medi.report.settings import ReadingSheetSettings
from latent_medi.shards.dataset import PatchDataset


@pytest.fixture(scope="module")
def made(small_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sheet of 36 pictures, two pairs for each class and site, and its key."""
    out = tmp_path_factory.mktemp("sheet") / "sheet.html"
    result = make_sheet(_settings(small_world, out))
    assert result["n"] == 36
    return Path(result["sheet"]), Path(result["key"])


def _settings(world: World, out: Path, **changes: object) -> ReadingSheetSettings:
    base = {"data": str(world.real), "synthetic": str(world.medi), "out": str(out), "n": 36}
    return ReadingSheetSettings(**(base | changes))  # type: ignore[arg-type]


def _key(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def _images(sheet: Path) -> dict[str, np.ndarray]:
    found = re.findall(r'data-image="(\w+)"[^>]*><img src="data:image/png;base64,([^"]+)"', sheet.read_text())
    return {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for name, data in found}


def test_the_sheet_is_balanced_and_shows_test_patients(small_world: World, made: tuple[Path, Path]) -> None:
    key = _key(made[1])
    assert (key.groupby(["field:class", "field:site", "origin"]).size() == 2).all()
    assert len(key.groupby(["field:class", "field:site"])) == 9
    real = PatchDataset.open(small_world.real).index.set_index("key")
    shown = real.loc[key.loc[key["origin"] == "real", "key"]]
    assert set(shown["split_main"]) == {"test"}
    assert shown["patient"].is_unique  # there are more patients than pictures in each combination


def test_the_key_tells_which_picture_is_which(small_world: World, made: tuple[Path, Path]) -> None:
    pictures = _images(made[0])
    assert len(pictures) == 36
    sources = {"real": PatchDataset.open(small_world.real), "synthetic": PatchDataset.open(small_world.medi)}
    for row in _key(made[1]).itertuples():
        dataset = sources[row.origin]
        number = int(np.flatnonzero(dataset.index["key"] == row.key)[0])
        assert np.array_equal(pictures[row.image], dataset.read([number])[0])


def test_nothing_in_the_sheet_tells_them_apart(made: tuple[Path, Path]) -> None:
    text = made[0].read_text()
    key = _key(made[1])
    without_pictures = re.sub(r"data:image/png;base64,[^\"]+", "", text)
    for word in {*key["key"], *key["field:class"], *key["field:site"], "planted", "perfect", "split", "key.csv"}:
        assert word not in without_pictures
    # What stands around a picture is the same for all but its name and number.
    items = re.findall(r"<li .*?</li>", without_pictures)
    assert len({re.sub(r'data-image="\w+"|Picture \d+| hidden', "", item) for item in items}) == 1
    for data in re.findall(r"data:image/png;base64,([^\"]+)", text):
        kinds = _chunks(base64.b64decode(data))
        assert set(kinds) == {"IHDR", "IDAT", "IEND"}
    runs = (key["origin"] != key["origin"].shift()).sum()
    assert 8 < runs < 30  # mixed, and not in turn
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", without_pictures)


def _chunks(png: bytes) -> list[str]:
    kinds, at = [], 8
    while at < len(png):
        kinds.append(png[at + 4 : at + 8].decode())
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return kinds


def test_the_same_seed_gives_the_same_sheet_and_another_another(small_world: World, tmp_path: Path) -> None:
    pages = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_sheet(_settings(small_world, tmp_path / f"{name}.html", seed=seed))
        pages.append((tmp_path / f"{name}.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_a_class_only_dataset_is_balanced_by_class(small_world: World, tmp_path: Path) -> None:
    result = make_sheet(_settings(small_world, tmp_path / "s.html", synthetic=str(small_world.cls), n=14))
    assert [c["pairs"] for c in result["cells"]] in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    assert [set(c["combination"]) for c in result["cells"]] == [{"class"}] * 3


def test_bad_input_for_a_sheet(small_world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data, synthetic and out"):
        make_sheet(ReadingSheetSettings())
    with pytest.raises(UserError, match="n is 1"):
        make_sheet(_settings(small_world, tmp_path / "s.html", n=1))
    with pytest.raises(UserError, match="no split 'mian'"):
        make_sheet(_settings(small_world, tmp_path / "s.html", split="mian"))
    with pytest.raises(UserError, match="'sight'"):
        make_sheet(_settings(small_world, tmp_path / "s.html", fields=["sight"]))
    with pytest.raises(UserError, match="no synthetic patch"):
        make_sheet(_settings(small_world, tmp_path / "s.html", synthetic=str(small_world.real)))
    assert not (tmp_path / "s.html").exists()


def _answer(key: pd.DataFrame, file: Path, right: int, missing: int = 0, reader: str = "A") -> str:
    """Answers of a reader: the first ``right`` are right, the last ``missing`` are left out."""
    other = {"real": "synthetic", "synthetic": "real"}
    said = [o if i < right else other[o] for i, o in enumerate(key["origin"])]
    said[len(said) - missing :] = [""] * missing
    table = pd.DataFrame(
        {
            "sheet": key["sheet"],
            "reader": reader,
            "image": key["image"],
            "answer": said,
            "confidence": "2",
            "seconds": "1.0",
        }
    )
    table.sample(frac=1, random_state=0).to_csv(file, index=False)
    return str(file)


def test_the_score_of_one_reader(made: tuple[Path, Path], tmp_path: Path) -> None:
    key = _key(made[1])
    file = _answer(key, tmp_path / "a.csv", right=26, missing=4)
    result = score_sheet(ReadingSheetSettings(score=[file], key=str(made[1])))
    reader = result["readers"][0]
    assert {k: reader[k] for k in ("reader", "n", "answered", "missing", "correct")} == {
        "reader": "A",
        "n": 36,
        "answered": 32,
        "missing": 4,
        "correct": 26,
    }
    assert reader["accuracy"]["value"] == pytest.approx(26 / 32)
    synthetic = (key["origin"] == "synthetic").to_numpy()
    assert reader["sensitivity"]["value"] == pytest.approx(synthetic[:26].sum() / synthetic[:32].sum())
    assert reader["specificity"]["value"] == pytest.approx((~synthetic[:26]).sum() / (~synthetic[:32]).sum())
    assert reader["p_value"] == pytest.approx(binomtest(26, 32, alternative="greater").pvalue)
    assert result["better_than_chance"]
    assert "better than chance" in result["verdict"]
    assert sum(c["answered"] for c in result["cells"]) == 32
    assert len(result["cells"]) <= 9
    assert result["majority"] is None


def test_wilson_interval_of_eight_in_ten(made: tuple[Path, Path], tmp_path: Path) -> None:
    file = _answer(_key(made[1]), tmp_path / "a.csv", right=8, missing=26)
    accuracy = score_sheet(ReadingSheetSettings(score=[file], key=str(made[1])))["readers"][0]["accuracy"]
    assert accuracy["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_chance_is_called_chance(made: tuple[Path, Path], tmp_path: Path) -> None:
    file = _answer(_key(made[1]), tmp_path / "a.csv", right=19)
    result = score_sheet(ReadingSheetSettings(score=[file], key=str(made[1])))
    assert not result["better_than_chance"]
    assert "did not do better than chance" in result["verdict"]
    # 24 of 36 is the first count that the test calls better.
    assert binomtest(24, 36, alternative="greater").pvalue < 0.05 < binomtest(23, 36, alternative="greater").pvalue
    assert "67 %" in result["verdict"]


def test_readers_are_judged_by_their_majority(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Two readers who say the same are one witness, not two."""
    key = _key(made[1])
    files = [_answer(key, tmp_path / f"{r}.csv", right=23, reader=r) for r in "ABC"]
    result = score_sheet(ReadingSheetSettings(score=files, key=str(made[1]), out=str(tmp_path / "score.csv")))
    assert [r["reader"] for r in result["readers"]] == ["A", "B", "C"]
    assert result["majority"]["answered"] == 36
    assert result["majority"]["ties"] == 0
    assert not result["better_than_chance"]  # 69 of 108 would be
    files[1] = _answer(key, tmp_path / "B.csv", right=0, reader="B")
    two = score_sheet(ReadingSheetSettings(score=files[:2], key=str(made[1])))
    assert (two["majority"]["ties"], two["majority"]["correct"]) == (23, 0)
    assert list(pd.read_csv(tmp_path / "score.csv")["reader"]) == ["A", "B", "C", "majority"]


def test_answers_that_do_not_fit_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    key = _key(made[1])

    def refused(match: str, *files: str, **changes: str) -> None:
        with pytest.raises(UserError, match=match):
            score_sheet(ReadingSheetSettings(score=list(files), key=changes.get("key", str(made[1]))))

    good = _answer(key, tmp_path / "good.csv", right=30)
    table = _key(Path(good))
    for name, column, value, match in (
        ("id", "image", "0123456789ab", "no picture '0123456789ab'"),
        ("sheet", "sheet", "feedfeedfeed", "answers the sheet 'feedfeedfeed'"),
        ("word", "answer", "fake", "not 'fake'"),
    ):
        changed = table.copy()
        changed.loc[3, column] = value
        changed.to_csv(tmp_path / f"{name}.csv", index=False)
        refused(match, str(tmp_path / f"{name}.csv"))
    refused("answered twice by 'A'", good, good)
    refused("does not exist", str(tmp_path / "none.csv"))
    refused("lacks the column 'number'", good, key=good)
    refused("lacks the column 'reader'", str(made[1]))
    refused("No picture is answered", _answer(key, tmp_path / "empty.csv", right=0, missing=36))


def test_answers_that_a_spreadsheet_saved_are_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    file = Path(_answer(_key(made[1]), tmp_path / "a.csv", right=26, missing=4))
    expected = score_sheet(ReadingSheetSettings(score=[str(file)], key=str(made[1])))
    lines = file.read_text().splitlines()
    file.write_text("sep=,\r\n" + "".join(f"{line},\r\n" for line in [*lines, ",,,,,", lines[0]]), "utf-8-sig")
    assert score_sheet(ReadingSheetSettings(score=[str(file)], key=str(made[1]))) == expected


def test_a_reader_without_a_name_is_called_after_the_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    file = _answer(_key(made[1]), tmp_path / "dr_who.csv", right=20, reader="")
    result = score_sheet(ReadingSheetSettings(score=[file], key=str(made[1])))
    assert result["readers"][0]["reader"] == "dr_who"


def test_both_ways_on_the_command_line(small_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet, key = tmp_path / "sheet.html", tmp_path / "sheet.key.csv"
    words = [f"data={small_world.real}", f"synthetic={small_world.medi}", f"out={sheet}", "n=8", "seed=1"]
    assert cli.run_verb(["reading-sheet", *words]) == 0
    files = [_answer(_key(key), tmp_path / f"{r}.csv", right=8, reader=r) for r in "AB"]
    assert cli.run_verb(["reading-sheet", "--score", *files, f"key={key}", "--json", str(tmp_path / "s.json")]) == 0
    assert "The majority of 2 readers recognised synthetic patches better than chance" in capsys.readouterr().out
    assert (tmp_path / "s.json").is_file()
