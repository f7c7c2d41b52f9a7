"""Goals, numbers and bounds, with counts worked out by hand on a table of 18 patches.

    ======  ====  =====  =====
            NA    aster  birch
    ======  ====  =====  =====
    benign     2      6      4
    tumour     3      3      0
    ======  ====  =====  =====

Every patch is of another patient.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.core.records import encode
from latent_medi.metadata.schema import Schema
from latent_medi.planning.plan import check_plan, read_plan, sample_at
from latent_medi.planning.planner import make_plan
from latent_medi.planning.settings import PlanSettings
from latent_medi.planning.summary import Budget, PlanResult, VerdictCount, plan_text
from latent_medi.shards.dataset import PatchDataset


@pytest.fixture
def ask(index: pd.DataFrame, schema: Schema):
    """Plan for the table above; none of its combinations is thin."""

    def asked(**settings: object) -> PlanResult:
        return make_plan(index, schema, PlanSettings(**{"thin_patients": 1, **settings}))

    return asked


def counts(planned: PlanResult) -> dict[tuple[str, str], int]:
    return {(row["class"], row["site"]): row["count"] for row in planned.table.to_dict("records")}


B, T = "benign", "tumour"
THERE = {(B, "NA"): 2, (B, "aster"): 6, (B, "birch"): 4, (T, "NA"): 3, (T, "aster"): 3}
EACH = [(c, s) for c in (B, T) for s in ("NA", "aster", "birch")]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"per_cell": 7}, {(T, "birch"): 7}),  # fill_unseen
        # Birch is known from benign patches, which the verdict rests on too.
        ({"per_cell": 7, "only": {"class": [T]}}, {(T, "birch"): 7}),
        ({"goal": "each", "per_cell": 3}, dict.fromkeys(EACH, 3)),
        ({"goal": "all_sites_of_classes", "per_cell": 5}, dict.fromkeys(EACH, 5)),
        ({"goal": "own_sites", "per_cell": 5}, dict.fromkeys([c for c in EACH if c != (T, "birch")], 5)),
        # No tumour at birch: with the tumours alone, birch is nobody's site.
        ({"goal": "all_sites_of_classes", "per_cell": 5, "only": {"class": [T]}}, {(T, "NA"): 5, (T, "aster"): 5}),
        ({"goal": "balance"}, {(B, "NA"): 4, (B, "birch"): 2, (T, "NA"): 3, (T, "aster"): 3, (T, "birch"): 6}),
        ({"goal": "balance", "per_cell": 4}, {(B, "NA"): 2, (T, "NA"): 1, (T, "aster"): 1, (T, "birch"): 4}),
        ({"goal": "balance", "only": {"site": ["birch", "NA"]}}, {(B, "NA"): 2, (T, "NA"): 1, (T, "birch"): 4}),
        ({"goal": "within_site"}, {(B, "NA"): 1, (T, "aster"): 3, (T, "birch"): 4}),
        # 0.5 × 18 = 9 images for 6 combinations: one each, and three more in turns over the class.
        (
            {"goal": "each", "ratio": 0.5},
            {(B, "NA"): 2, (B, "aster"): 2, (B, "birch"): 1, (T, "NA"): 2, (T, "aster"): 1, (T, "birch"): 1},
        ),
        ({"goal": "each", "ratio": 1}, dict.fromkeys(EACH, 3)),
        ({"goal": "all_sites_of_classes", "ratio": 2, "only": {"class": [T]}}, {(T, "NA"): 6, (T, "aster"): 6}),
        ({"ratio": 0.25}, {(T, "birch"): 4}),  # 4.5 rounded down, as by MeDi
        # As many as there are, spread as they are.
        (
            {"goal": "own_sites", "ratio": 1, "spread": "real"},
            {(B, "NA"): 2, (B, "aster"): 6, (B, "birch"): 4, (T, "NA"): 3, (T, "aster"): 3},
        ),
        # All that is lacking is 18: half of it, 2 + 1 + 1.5 + 1.5 + 3; ...
        (
            {"goal": "balance", "ratio": 0.5},
            {(B, "NA"): 2, (B, "birch"): 1, (T, "NA"): 2, (T, "aster"): 1, (T, "birch"): 3},
        ),
        # ... and twice as much: what is lacking and 18 more, 3 for each of the six.
        (
            {"goal": "balance", "ratio": 2},
            {(B, "NA"): 7, (B, "aster"): 3, (B, "birch"): 5, (T, "NA"): 6, (T, "aster"): 6, (T, "birch"): 9},
        ),
        # 6 of 18: 1.33, 0.67, 1, 1, 2.
        (
            {"goal": "balance", "max_images": 6},
            {(B, "NA"): 1, (B, "birch"): 1, (T, "NA"): 1, (T, "aster"): 1, (T, "birch"): 2},
        ),
        ({"goal": "balance", "max_images": 1}, {(T, "birch"): 1}),
        # 0.001 h × 3600 × 2 images/s = 7.2; the smaller budget holds.
        ({"gpu_hours": 0.001, "images_per_s": 2.0, "max_images": 50}, {(T, "birch"): 7}),
        ({"per_cell": 3, "max_images": 100}, {(T, "birch"): 3}),  # a budget is no target
        (
            {"goal": "balance", "max_per_cell": 3},
            {(B, "NA"): 3, (B, "birch"): 2, (T, "NA"): 3, (T, "aster"): 3, (T, "birch"): 3},
        ),
        (
            {"goal": "balance", "min_per_cell": 2, "max_images": 12},
            {(B, "NA"): 2, (B, "birch"): 2, (T, "NA"): 2, (T, "aster"): 2, (T, "birch"): 4},
        ),
        ({"goal": "within_site", "min_per_cell": 4}, {(B, "NA"): 4, (T, "aster"): 4, (T, "birch"): 4}),
        ({"goal": "each", "ratio": 100, "max_per_cell": 5}, dict.fromkeys(EACH, 5)),
        # What there is, and tumours at birch as often as benign patches are there.
        ({"tasks": {"both": [T, B]}}, {**THERE, (T, "birch"): 4}),
        ({"tasks": {"both": [T, B]}, "ratio": 2}, {cell: 2 * n for cell, n in {**THERE, (T, "birch"): 4}.items()}),
        # 11 of 22: half of each, and of the odd ones the turns over the class decide.
        (
            {"tasks": {"both": [T, B]}, "max_images": 11},
            {(B, "NA"): 1, (B, "aster"): 3, (B, "birch"): 2, (T, "NA"): 2, (T, "aster"): 1, (T, "birch"): 2},
        ),
        ({"tasks": {"both": [T, B]}, "only": {"class": [T]}}, {(T, "NA"): 3, (T, "aster"): 3}),
    ],
)
def test_counts_by_hand(settings: dict, wanted: dict, ask) -> None:
    planned = ask(**settings)
    assert counts(planned) == wanted
    assert planned.summary.images == sum(wanted.values())


def test_a_ratio_is_a_decimal_number(index: pd.DataFrame, schema: Schema) -> None:
    hundred = pd.concat([index] * 6).iloc[:100]
    assert make_plan(hundred, schema, PlanSettings(goal="each", ratio=0.29)).summary.images == 29  # not 28.999…


def test_one_field_and_what_the_others_hold(ask) -> None:
    table = ask(goal="each", per_cell=3, fields=["class"], draw_from="all").table
    assert table[["class", "site", "age"]].to_numpy().tolist() == [[B, "", "real"], [T, "", "real"]]


def test_plans_are_the_same_in_every_release(index: pd.DataFrame, schema: Schema) -> None:
    # Made by the first release, which had these goals only and drew from the schema's quantiles.
    for settings, digest in (
        (PlanSettings(goal="each", per_cell=3), "e2856cc64a4c144d"),
        (PlanSettings(goal="fill_unseen", per_cell=7, thin_patients=1), "1174862718a15171"),
        (PlanSettings(goal="balance", thin_patients=1), "36fde608d2e48718"),
        (PlanSettings(goal="balance", per_cell=9, fields=["class"], seed=5), "1ce44495857c89d6"),
        (PlanSettings(goal="each", per_cell=2, fields=["site"]), "bfb07c08e3d56648"),
    ):
        settings.draw_from = "all"
        text = make_plan(index, schema, settings).table.to_csv(index=False)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_the_order_of_the_index_does_not_matter(index: pd.DataFrame, schema: Schema) -> None:
    settings = PlanSettings(goal="balance", ratio=0.7)
    shuffled = index.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(make_plan(index, schema, settings).table, make_plan(shuffled, schema, settings).table)


def test_seeds_depend_on_the_combination_and_the_plans_seed(ask) -> None:
    few, many = ask(per_cell=1, seed=3).table, ask(goal="each", per_cell=1, seed=3).table
    assert many["seed"].nunique() == len(many)
    assert few["seed"].tolist() == many["seed"].tolist()[-1:]
    assert not many["seed"].equals(ask(goal="each", per_cell=1, seed=4).table["seed"])


def test_unknown_values_count_for_the_ratio_and_for_no_combination(index: pd.DataFrame, schema: Schema) -> None:
    index = index.assign(site=index["site"].where(index["site"] != "NA", "unknown"))  # 5 rows
    planned = make_plan(index, schema, PlanSettings(goal="own_sites", ratio=1, thin_patients=2))
    assert counts(planned) == {(B, "aster"): 6, (B, "birch"): 6, (T, "aster"): 6}
    assert planned.summary.real == 18


@pytest.fixture
def apart(index: pd.DataFrame) -> pd.DataFrame:
    """Six benign ones at aster and three tumours at NA: nothing links the two."""
    pairs = zip(index["class"], index["site"], strict=True)
    return index[[pair in {(B, "aster"), (T, "NA")} for pair in pairs]]


def test_unidentifiable_combinations_get_nothing_unless_forced(apart: pd.DataFrame, schema: Schema) -> None:
    planned = make_plan(apart, schema, PlanSettings(goal="fill_unseen", per_cell=5, thin_patients=1))
    assert counts(planned) == dict.fromkeys([(B, "NA"), (B, "birch"), (T, "aster"), (T, "birch")], 0)
    assert planned.summary.verdicts["unidentifiable"] == VerdictCount(4, 0)
    assert "4 combinations are left at 0" in plan_text(planned)
    settings = PlanSettings(goal="balance", ratio=1, thin_patients=1)
    # Only tumours at NA can be topped up, by 3; the other 6 of 9 are shared with benign ones at aster.
    planned = make_plan(apart, schema, settings)
    assert {cell: n for cell, n in counts(planned).items() if n} == {(B, "aster"): 3, (T, "NA"): 6}
    settings.force_unidentifiable, settings.ratio = True, 0
    planned = make_plan(apart, schema, settings)
    assert counts(planned) == {(B, "NA"): 6, (B, "birch"): 6, (T, "NA"): 3, (T, "aster"): 6, (T, "birch"): 6}
    assert planned.summary.verdicts["unidentifiable"] == VerdictCount(4, 24)
    assert Counter(planned.table["verdict"]) == {"unidentifiable": 4, "seen": 1}


def test_tasks_with_shared_sites_and_classes(index: pd.DataFrame, schema: Schema) -> None:
    """Three classes, made of the two: each unseen cell gets the patches of its task's other classes at the site."""
    tumours = (index["class"] == T).to_numpy()
    kinds = np.where(tumours & (index["site"] == "aster"), "other", np.where(tumours, "tumour", "benign"))
    index = index.assign(**{"class": kinds})
    schema = Schema.from_table(index.assign(age="50"), "class", ["site"], [], {})
    seen = {(B, "NA"): 2, (B, "aster"): 6, (B, "birch"): 4, (T, "NA"): 3, ("other", "aster"): 3}
    tasks = {"pair": [T, "other"], "all": [B, T, "other"]}
    planned = make_plan(index, schema, PlanSettings(tasks=tasks))
    # "other" at NA: 3 tumours for the pair, 3 + 2 benign for all three; the larger number holds.
    new = {(T, "aster"): 3 + 6, ("other", "NA"): 3 + 2, (T, "birch"): 4, ("other", "birch"): 4}
    assert counts(planned) == {**seen, **new}
    pair = make_plan(index, schema, PlanSettings(tasks={"pair": [T, "other"]}))
    assert counts(pair) == {**seen, (T, "aster"): 3, ("other", "NA"): 3}


def test_tasks_plan_what_the_data_cannot_separate(apart: pd.DataFrame, schema: Schema) -> None:
    planned = make_plan(apart, schema, PlanSettings(tasks={"both": [B, T]}))
    assert counts(planned) == {(B, "aster"): 6, (T, "NA"): 3, (B, "NA"): 3, (T, "aster"): 6}
    assert planned.summary.verdicts["unidentifiable"] == VerdictCount(2, 9)
    assert "2 combinations are planned although the data cannot separate their effects" in plan_text(planned)


def test_summary(ask) -> None:
    summary = ask(goal="balance", max_images=9, images_per_s=0.5).summary
    assert (summary.real, summary.asked, summary.wanted, summary.images, summary.rows) == (18, 18, 18, 9, 5)
    assert summary.budget == Budget(9, 9, 0.005)
    assert summary.verdicts["both margins seen"] == VerdictCount(1, 3)
    assert summary.verdicts["seen"] == VerdictCount(4, 6)
    assert summary.before_after.fields == ["class", "site"]
    cells = {(c["class"], c["site"]): (c["real"], c["planned"]) for c in summary.before_after.cells}
    assert cells == {
        (B, "NA"): (2, 2),
        (B, "aster"): (6, 0),
        (B, "birch"): (4, 1),
        (T, "NA"): (3, 2),
        (T, "aster"): (3, 1),
        (T, "birch"): (0, 3),
    }
    json.dumps(encode(summary), allow_nan=False)


def test_a_table_of_numbers_to_reach(ask, tmp_path: Path) -> None:
    path = tmp_path / "target.csv"
    path.write_text("site,class,count\nNA,benign,5\nbirch,tumour,2.0\naster,benign,4\n")
    planned = ask(target=str(path))
    assert counts(planned) == {(B, "NA"): 3, (T, "birch"): 2}
    assert planned.summary.goal == "target"
    path.write_text("class,count\ntumour,10\n")  # six there are
    table = ask(target=str(path), max_images=3).table
    assert table[["class", "site", "count"]].to_numpy().tolist() == [[T, "", 3]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class,site\nbenign,NA", "no column 'count'"),
        ("class,hospital,count\nbenign,NA,3", "'hospital', no field"),
        ("class,site,count\nbenign,astor,3", "row 1: Field 'site' has no value 'astor'; closest: 'aster'"),
        ("class,site,count\nbenign,unknown,3", "row 1: site is 'unknown'"),
        ("class,site,count\nbenign,,3", "row 1: site is ''"),
        ("class,age,count\nbenign,50,3", "continuous"),
        ("class,count\nbenign,-3", "row 1: count is -3"),
        ("class,count\nbenign,1000000000", "row 1: count is 1000000000"),
        ("class,count\nbenign,NaN", "'NaN'"),
        ("class,count\nbenign,1e3", "count is 1e3"),
        ("class,count\nbenign,12.5", r"count is 12\.5"),
        ("class,count\nbenign,3\nbenign,4", "rows 1 and 2 are of the same"),
        ("count\n3", "no column of a field"),
        ("class,count", "no row"),
    ],
)
def test_targets_that_cannot_be_meant(text: str, words: str, ask, tmp_path: Path) -> None:
    (tmp_path / "target.csv").write_text(text + "\n")
    with pytest.raises(UserError, match=words):
        ask(target=str(tmp_path / "target.csv"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"goal": "each"}, "per_cell, ratio, or a budget"),
        ({"goal": "each", "per_cell": -3}, "per_cell is -3"),
        ({"goal": "each", "per_cell": 10**9}, "asks for 600000000 images"),
        ({"goal": "each", "per_cell": 9 * 10**7}, "asks for 540000000 images"),
        ({"goal": "each", "ratio": float("nan")}, "ratio is NaN"),
        ({"goal": "each", "ratio": -1.0}, r"ratio is -1\.0"),
        ({"goal": "each", "ratio": 1.0, "per_cell": 4}, "per_cell and ratio"),
        ({"goal": "tasks"}, "'tasks' needs tasks"),
        ({"goal": "each", "per_cell": 1, "tasks": {"a": [B, T]}}, "goal=each contradicts them"),
        ({"tasks": {"a": [B, T]}, "per_cell": 2}, "counts real patches, so per_cell"),
        ({"tasks": {"a": [B]}}, "'a' needs two or more different classes"),
        ({"tasks": {"a": [B, B]}}, "'a' needs two or more different classes"),
        ({"tasks": {"a": [B, "tumor"]}}, "names the class 'tumor', which the data lack .closest: 'tumour'"),
        ({"tasks": {"a": [B, T]}, "fields": ["class"]}, "combines the class with a site"),
        ({"goal": "within_site", "per_cell": 4}, "within_site"),
        ({"goal": "each", "per_cell": 1, "fields": ["age"]}, "continuous"),
        ({"goal": "each", "per_cell": 1, "fields": ["cite"]}, "closest: 'site'"),
        ({"goal": "each", "per_cell": 1, "only": {"site": ["astor"]}}, "closest: 'aster'"),
        ({"goal": "each", "per_cell": 1, "only": {"site": []}}, "no value of 'site'"),
        ({"goal": "each", "per_cell": 1, "only": {"site": ["NA"]}, "fields": ["class"]}, "not among the fields"),
        ({"goal": "all_sites_of_classes", "per_cell": 1, "fields": ["site"]}, "the class with a site"),
        ({"goal": "each", "gpu_hours": 2.0}, "gpu_hours needs images_per_s"),
        ({"goal": "each", "gpu_hours": 1e-6, "images_per_s": 1.0}, "not one image"),
        (
            {"goal": "each", "per_cell": 1, "min_per_cell": 5, "max_per_cell": 4},
            "min_per_cell = 5 is above max_per_cell = 4",
        ),
        (
            {"goal": "balance", "min_per_cell": 5, "max_images": 12},
            "min_per_cell = 5 for 5 combinations is 25 images.*12",
        ),
        ({"goal": "target"}, "needs a target table"),
        ({"goal": "balance", "target": "wanted.csv"}, "contradicts"),
        ({"target": "wanted.csv", "ratio": 1.0}, "ratio contradicts"),
        ({"goal": "each", "ratio": 1.0, "spread": "real"}, "goal=own_sites"),
        ({"goal": "each", "per_cell": 1, "thin_patients": 0}, "thin_patients is 0"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, words: str, ask) -> None:
    with pytest.raises(UserError, match=words):
        ask(**settings)


def test_everything_that_is_wrong_is_said_at_once(index: pd.DataFrame, schema: Schema, capsys, tmp_path: Path) -> None:
    path = tmp_path / "slides.csv"
    index.to_csv(path, index=False)
    words = [
        "goal=each",
        "gpu_hours=1",
        "min_per_cell=9",
        "max_per_cell=3",
        "fields=[cite]",
        f"out={path}.txt",
    ]
    assert main(["plan", str(path), *words]) == 2
    told = capsys.readouterr().err
    for part in ("images_per_s", "min_per_cell = 9", "must end in .csv or .parquet", "cite"):
        assert part in told
    assert main(["plan", str(path), "goal=each", "per_cell=2", "only.class=[tumor]", f"out={tmp_path}/p.csv"]) == 2
    assert "closest: 'tumour'" in capsys.readouterr().err


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Slides of two cancers at two hospitals under three codes, with ages: LUAD at Duke (12 patients aged 40 to 51,
    code 4P) and Roswell (2 aged 60, 61), LUSC at Duke (11 aged 70; 4 more with none, code NA).
    """
    lines = ["project_id,tissue_source_site,case_submitter_id,slide_submitter_id,age_at_index,split_main"]
    patients = [("LUAD", "4P", f"A{i:03d}", str(40 + i)) for i in range(12)]
    patients += [("LUAD", "73", f"B{i:03d}", str(60 + i)) for i in range(2)]
    patients += [("LUSC", "NA", f"C{i:03d}", "70" if i < 11 else "'--") for i in range(15)]
    for project, code, name, age in patients:
        case = f"TCGA-{code}-{name}"
        lines.append(f"{project},{code},{case},{case}-01Z-00-DX1,{age},{'test' if name == 'C014' else 'train'}")
    (tmp_path / "slides.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "codes.tsv").write_text(
        "TSS Code\tSource Site\tStudy Name\tBCR\nNA\tDuke University\tU\tB\n4P\tDuke\tH\tB\n73\tRoswell Park\tL\tB\n"
    )
    return tmp_path


def test_a_bare_table_with_codes_from_the_command_line(cohort: Path, capsys) -> None:
    words = ["plan", str(cohort / "slides.csv"), "class_field=project_id", "site_field=tissue_source_site"]
    words += [
        "continuous=[age_at_index]",
        "goal=all_sites_of_classes",
        "ratio=1",
        f"out={cohort}/plan.csv",
        f"figure={cohort}/plan.png",
    ]
    assert main([*words, f"tss_table={cohort}/codes.tsv", "--json", str(cohort / "plan.json")]) == 0
    told = json.loads((cohort / "plan.json").read_text())
    # 28 rows are of the training part; 7 images for each class at each hospital.
    assert (told["real"], told["images"], told["unit"]) == (28, 28, "rows")
    assert told["drawn"] == {"age_at_index": {"cell": 2, "class": 2, "all": 0}}
    assert (cohort / "plan.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "12+7" in shown
    assert "0+7" in shown
    plan = read_plan(cohort / "plan.csv")
    assert plan["count"].tolist() == [7, 7, 7, 7]
    by = {(row["project_id"], row["tissue_source_site"]): row for row in plan.to_dict("records")}
    duke, roswell = sorted({site for _, site in by})
    assert (duke[:4], roswell[:4]) == ("Duke", "Rosw")
    ages = [*range(40, 52)]
    quantiles = " ".join(f"{q:.6g}" for q in np.quantile(ages, np.linspace(0, 1, 21)))
    assert by["LUAD", duke]["age_at_index_quantiles"] == quantiles
    assert by["LUAD", duke]["age_at_index_unknown"] == "0"
    assert by["LUAD", roswell]["age_at_index_quantiles"] == " ".join(  # two patients are too few: the class
        f"{q:.6g}" for q in np.quantile([*ages, 60, 61], np.linspace(0, 1, 21))
    )
    assert by["LUSC", duke]["age_at_index_quantiles"] == " ".join(["70"] * 21)
    assert by["LUSC", roswell]["age_at_index_unknown"] == "0.2143"  # 3 of 14


def test_where_nobody_of_a_class_has_a_value_all_are_drawn_from(cohort: Path) -> None:
    table = pd.read_csv(cohort / "slides.csv", dtype=str, keep_default_na=False)
    table.loc[table["project_id"] == "LUSC", "age_at_index"] = "'--"
    table.to_csv(cohort / "slides.csv", index=False)
    words = ["plan", str(cohort / "slides.csv"), "class_field=project_id", "site_field=tissue_source_site", "goal=each"]
    assert main([*words, "per_cell=1", "continuous=[age_at_index]", "split=", f"out={cohort}/plan.parquet"]) == 0
    plan = read_plan(cohort / "plan.parquet")
    luad, lusc = plan[plan["project_id"] == "LUAD"], plan[plan["project_id"] == "LUSC"]
    assert set(lusc["age_at_index_unknown"]) == {"1"}  # as in the data
    assert lusc["age_at_index_quantiles"].iloc[0].split()[-1] == "61"
    assert luad["age_at_index_quantiles"].iloc[0].split()[-1] in ("51", "61")


def test_drawn_values_follow_the_plan_without_the_dataset(cohort: Path) -> None:
    words = ["plan", str(cohort / "slides.csv"), "class_field=project_id", "site_field=tissue_source_site"]
    words += ["continuous=[age_at_index]", "goal=own_sites", "per_cell=400", f"out={cohort}/plan.csv"]
    assert main([*words, f"tss_table={cohort}/codes.tsv"]) == 0
    plan = read_plan(cohort / "plan.csv")
    sites = sorted(set(plan["tissue_source_site"]))
    other = pd.DataFrame({"project_id": ["LUAD", "LUSC"], "tissue_source_site": sites, "age_at_index": ["5", "6"]})
    schema = Schema.from_table(other, "project_id", ["tissue_source_site"], ["age_at_index"])  # another model's
    plan = check_plan(plan, schema)
    ends = np.cumsum(plan["count"].to_numpy())
    samples = [sample_at(plan, schema, i, ends).fields for i in range(ends[-1])]
    at_duke = [s["age_at_index"] for s in samples if (s["project_id"], s["tissue_source_site"]) == ("LUAD", sites[0])]
    assert len(at_duke) == 400
    assert 40 <= min(at_duke) < 41
    assert 50 < max(at_duke) <= 51
    unknown = [s["age_at_index"] == "unknown" for s in samples if s["project_id"] == "LUSC"]
    assert np.mean(unknown) == pytest.approx(3 / 14, abs=0.08)


def test_a_dataset_folder_and_its_split(tiny: Path, tmp_path: Path) -> None:
    words = ["plan", f"data={tiny / 'data'}", "split=", f"out={tmp_path / 'plan.csv'}"]
    assert main([*words, "goal=each", "per_cell=2", "--json", str(tmp_path / "plan.json")]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["unit"] == "patches"
    assert told["images"] == 2 * len(read_plan(tmp_path / "plan.csv")) > 0


def test_a_dataset_folder_is_planned_from_its_training_part(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", f"data={tiny / 'data'}", f"out={tmp_path / 'plan.csv'}", "goal=balance"]
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    dataset = PatchDataset.open(tiny / "data")
    train = dataset.index[dataset.index["split_main"] == "train"]
    most = train.groupby(["class", "site"]).size().max()
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["images"] == 6 * most - len(train)
    assert told["images"] != 6 * dataset.index.groupby(["class", "site"]).size().max() - len(dataset.index)
    assert main([*words, "split=mian"]) == 2
    assert "has no split 'mian'; closest: 'main'" in capsys.readouterr().err


def test_patches_per_row(cohort: Path) -> None:
    words = ["plan", str(cohort / "slides.csv"), "class_field=project_id", "site_field=tissue_source_site"]
    words += [f"tss_table={cohort}/codes.tsv", "goal=own_sites", "ratio=0.5", "patches_per_row=30", "spread=real"]
    assert main([*words, f"out={cohort}/plan.csv"]) == 0
    assert read_plan(cohort / "plan.csv")["count"].tolist() == [180, 30, 210]  # 12, 2 and 14 rows


def test_one_screen_however_many_sites(schema: Schema) -> None:
    rows = [
        {
            "key": f"{c}{s}",
            "patient": f"p{c}{s}",
            "slide": f"s{c}{s}",
            "class": f"class {c:02d}",
            "site": f"site {s:03d}",
        }
        for c in range(40)
        for s in range(139)
        if (c + s) % 3
    ]
    index = pd.DataFrame(rows)
    planned = make_plan(index, Schema.from_table(index, "class", ["site"]), PlanSettings(goal="balance"))
    lines = plan_text(planned).splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 170
    assert any("133 others" in line for line in lines)
    added = re.findall(r"\d\+([\d,]+)", "\n".join(lines))
    assert sum(int(number.replace(",", "")) for number in added) == planned.summary.images


@pytest.mark.parametrize(
    ("settings", "combined"),
    [
        ({}, ["class", "site"]),
        ({"site_field": "tss"}, ["class", "tss"]),
        ({"only": {"tss": ["05"]}}, ["class", "site", "tss"]),
        ({"fields": ["class", "tss"]}, ["class", "tss"]),
    ],
)
def test_of_a_site_code_and_its_institution_one_is_combined(settings: dict, combined: list[str]) -> None:
    rows = pd.DataFrame({"class": list("abab"), "site": list("xxyy"), "tss": ["05", "06", "07", "08"]})
    schema = Schema.from_table(rows, "class", ["site", "tss"])
    rows = rows.assign(patient=list("pqrs"), key=list("klmn"), slide=list("klmn"))
    planned = make_plan(rows, schema, PlanSettings(goal="each", per_cell=1, **settings))
    assert planned.summary.fields == combined
    assert list(planned.table.columns)[:3] == ["class", "site", "tss"]  # samples name every field all the same
