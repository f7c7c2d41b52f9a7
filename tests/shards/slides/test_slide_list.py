from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.list_slides import ListedSlide, list_slides


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def listed(source: Path, rows: str = "", **more: object) -> list[ListedSlide]:
    """The slides that a command would cut, with a table if there are rows."""
    values: dict = {"source": str(source), "out": "none", **more}
    if rows:
        path = source.parent / "table.csv"
        path.write_text(rows, encoding="utf-8")
        values["table"] = str(path)
    return list_slides(SlideSettings(**values))[0]


def keys(slides: list[ListedSlide]) -> dict[str, str]:
    return {slide.name: slide.key for slide in slides}


def test_names_alike_are_told_apart_by_their_folder_and_others_stay_as_they_are(tmp_path: Path) -> None:
    source = touch(tmp_path / "s", "P1/HE.tif", "P2/HE.tif", "P2/Ki67.b.tif", "alone.svs")
    assert keys(listed(source)) == {
        "P1/HE.tif": "P1-HE",
        "P2/HE.tif": "P2-HE",
        "P2/Ki67.b.tif": "Ki67-b",
        "alone.svs": "alone",
    }
    # What a folder does not tell apart, what the path hashes to does, whatever else is there.
    touch(source, "S1.2.tif", "S1-2.tif", "x.tif", "x.tiff", "P1-HE.tif")
    found = keys(listed(source))
    assert len(set(found.values())) == len(found) == 9
    assert found["P1-HE.tif"] == "P1-HE"
    assert found["P1/HE.tif"].startswith("HE-")
    again = keys(listed(touch(tmp_path / "t", "S1.2.tif", "S1-2.tif")))
    assert all(found[name] == key for name, key in again.items())


def test_one_barcode_in_two_files_as_the_gdc_gives_them(tmp_path: Path) -> None:
    name = "TCGA-3L-AA1B-01Z-00-DX1.8923A151-A690-40B7-9E5A-FCBEDFC2394F.svs"
    other = "TCGA-3L-AA1B-01Z-00-DX1.1113A151-A690-40B7-9E5A-FCBEDFC2394F.svs"
    slides = listed(touch(tmp_path / "s", f"uuid-1/{name}", f"uuid-2/{other}"))
    assert [slide.key for slide in slides] == ["uuid-1-TCGA-3L-AA1B-01Z-00-DX1", "uuid-2-TCGA-3L-AA1B-01Z-00-DX1"]
    assert {slide.patient for slide in slides} == {"TCGA-3L-AA1B"}


def test_a_barcode_of_a_patient_or_none_at_all_ends_nothing(tmp_path: Path) -> None:
    source = touch(tmp_path / "s", "TCGA-3L-AA1B.svs", "TCGA-nothing.svs", "a.svs")
    slides = {slide.name: slide for slide in listed(source)}
    assert (slides["TCGA-3L-AA1B.svs"].key, slides["TCGA-3L-AA1B.svs"].patient) == ("TCGA-3L-AA1B", "TCGA-3L-AA1B")
    assert "begins like a TCGA barcode" in slides["TCGA-nothing.svs"].fault
    assert not slides["a.svs"].fault
    with_table = listed(source, "slide,patient\nTCGA-nothing.svs,p\n")[0]
    assert (with_table.key, with_table.fault) == ("TCGA-nothing", "")


@pytest.mark.parametrize("cells", [["s_1", "S2.B", "s_3"], ["s_1.tif", "S2.B.tif", "sub\\s_3.tif"], ["sub/s_3"]])
def test_a_table_names_slides_with_or_without_ending_and_folder(tmp_path: Path, cells: list[str]) -> None:
    source = touch(tmp_path / "s", "s_1.tif", "S2.B.tif", "sub/s_3.tif", "other.tif")
    (source / "s_1").mkdir()  # as a MIRAX slide has
    slides = listed(
        source,
        "slide_id,case_id\n" + "".join(f"{cell},p{i}\n" for i, cell in enumerate(cells)),
        slide_column="slide_id",
        patient_column="case_id",
    )
    stems = {"s": "s_1", "S": "S2-B"}
    assert [slide.key for slide in slides] == ["s_3" if "s_3" in cell else stems[cell[0]] for cell in cells]
    assert all(slide.path.is_file() for slide in slides)
    assert [slide.patient for slide in slides] == [f"p{i}" for i in range(len(cells))]


def test_what_a_table_means_twice_or_not_at_all_is_named(tmp_path: Path) -> None:
    source = touch(tmp_path / "s", "P1/HE.tif", "P2/HE.tif", "a.tif", "decomposed u\u0308.tif")
    rows = "slide,patient\nHE,p1\nP2/HE,p2\na,p3\ngone.svs,p4\nno.where,p5\n,p6\ndecomposed \u00fc,p7\n"
    slides = listed(source, rows)
    assert slides[0].fault.startswith("ambiguous: 2 files are meant (P1/HE.tif, P2/HE.tif)")
    assert [slide.key for slide in slides[1:5]] == ["HE", "a", "gone", "no-where"]
    assert slides[5].fault.startswith("row 6 of the table")
    assert slides[6].path.is_file()
    with pytest.raises(UserError, match=r"Rows 1 and 3 of .*name the same slide"):
        listed(source, "slide,patient\na,p1\nP1/HE,p2\na.tif,p3\n")


def test_a_key_column(tmp_path: Path) -> None:
    source = touch(tmp_path / "s", "P1/HE.tif", "P2/HE.tif", "c.tif")
    rows = "slide,patient,name\nP1/HE.tif,a,one\nP2/HE.tif,b,two\nc.tif,c,with.dot\n"
    slides = listed(source, rows, key_column="name")
    assert [slide.key for slide in slides[:2]] == ["one", "two"]
    assert "mend it in the column 'name'" in slides[2].fault
    with pytest.raises(UserError, match=r"P2/HE.tif and P1/HE.tif have the same name, 'one'"):
        listed(source, rows.replace("two", "one"), key_column="name")
    with pytest.raises(UserError, match=r"lacks column 'nam' .*closest: 'name'"):
        listed(source, rows, key_column="nam")
    with pytest.raises(UserError, match="need a table"):
        listed(source, key_column="name")


def test_long_and_odd_names_end_nothing(tmp_path: Path) -> None:
    long, longer = "長い名前の病理標本" * 9 + ".tif", "x" * 251 + ".tif"
    source = touch(tmp_path / "s", "ok.tif", long, longer, "trailing .tif", "new\nline.tif", "-dash.tif", "a#b%.tif")
    slides = {slide.name: slide for slide in listed(source)}
    assert {name for name, slide in slides.items() if slide.fault} == {"trailing .tif", "new\nline.tif"}
    good = [slide for slide in slides.values() if not slide.fault]
    assert all(len(slide.key.encode()) <= 155 for slide in good)
    assert len({slide.key for slide in good}) == 5
    assert slides["ok.tif"].key == "ok"


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\x00"), min_size=1, max_size=60).filter(
            lambda name: not name.startswith(".") and len(name.encode()) < 250
        ),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
def test_any_names_give_keys_that_are_distinct_and_fit(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    source = tmp_path_factory.mktemp("names")
    for name in names:
        touch(source, f"{data.draw(st.sampled_from(['', 'P1/', 'P.1/', ' /']))}{name}.tif")
    slides = listed(source)
    good = [slide for slide in slides if not slide.fault]
    assert len({slide.key for slide in good}) == len(good)
    for slide in good:
        assert 0 < len(slide.key.encode()) <= 155
        assert not set("./\\") & set(slide.key)
        assert len(os.fsencode(f".tmp-1234567-{slide.key}.png")) < 255


def test_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = touch(tmp_path / "s", "a.tif", "sub/b.tif")
    touch(tmp_path / "store", "c.tif")
    (source / "linked").symlink_to(tmp_path / "store")
    (source / "0 first.tif").symlink_to(source / "a.tif")  # a second patient, if it were cut
    (source / "loop").symlink_to(source)
    (source / "gone.tif").symlink_to("/nowhere/gone.tif")
    slides = listed(source)
    assert [slide.name for slide in slides if not slide.fault] == ["a.tif", "linked/c.tif", "sub/b.tif"]
    assert [(slide.name, slide.fault) for slide in slides if slide.fault] == [
        ("gone.tif", "a link to /nowhere/gone.tif, which is not there or out of reach")
    ]
    assert "0 first.tif is the same file as" in caplog.text


def test_patients_that_are_only_guessed_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["C3L-00001-21", "C3L-00001-22", "C3L-00002-21", "TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2"]
    source = touch(tmp_path / "s", *(f"{name}.tif" for name in names))
    with caplog.at_level(logging.WARNING):
        listed(source)
    assert "3 of 5 slides count as a patient each" in caplog.text
    assert "one person (1 such groups): C3L-00001-21, C3L-00001-22" in caplog.text
    caplog.clear()
    listed(source, "slide,patient\nC3L-00001-21,C3L-00001\nC3L-00001-22,C3L-00001\n")
    listed(touch(tmp_path / "tcga", *(f"{name}.tif" for name in names[3:])))
    assert not caplog.text
    listed(touch(tmp_path / "study", *(f"study1-{i:03d}.tif" for i in range(50))))
    assert "one person" not in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0.00025", "Is it in mm? That would be 0.25 µm per pixel"),
        ("250", "Is it in nm? That would be 0.25 µm per pixel"),
        ("-1", "from 0.05 to 20"),
        ("nan", "from 0.05 to 20"),
        ("inf", "from 0.05 to 20"),
        ('"0,25"', "decimal comma"),
    ],
)
def test_resolutions_in_another_unit_are_refused(tmp_path: Path, text: str, told: str) -> None:
    source = touch(tmp_path / "s", "a.tif")
    (tmp_path / "mpp.csv").write_text(f"slide,mpp\na,{text}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        listed(source, mpp_table=str(tmp_path / "mpp.csv"))
    assert told in str(caught.value)
    assert "µm per pixel" in str(caught.value)


def test_resolutions_of_slides_that_are_named_alike(tmp_path: Path) -> None:
    source = touch(tmp_path / "s", "P1/HE.tif", "P2/HE.tif", "c.tif")
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\nP1/HE.tif,0.5\nP2-HE,0.25\nc,1\n")
    assert [slide.mpp for slide in listed(source, mpp_table=str(table))] == [0.5, 0.25, 1.0]
    table.write_text("slide,mpp\nHE,0.5\n")
    with pytest.raises(UserError, match=r"'HE', which may be P1/HE.tif or P2/HE.tif"):
        listed(source, mpp_table=str(table))
    table.write_text("slide,mpp\nc,0.5\nc.tif,0.25\n")
    with pytest.raises(UserError, match=r"gives c.tif two resolutions: 0.5 and 0.25"):
        listed(source, mpp_table=str(table))


def test_columns_that_do_not_go_along_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = touch(tmp_path / "s", "a.svs")
    caplog.set_level("INFO")
    listed(source, "slide,patient,grade,hospital\na,p,g,h\n", class_field="grade")
    assert "not taken are the columns hospital." in caplog.text
