"""The rule of the verdict, its sentence, and that there is none where none is due."""

import copy
import math
from dataclasses import replace

import pytest

from latent_medi.evaluation.no_verdict import patient_group
from latent_medi.evaluation.results import metrics_of
from latent_medi.evaluation.summary import headline, headline_json, headline_text
from latent_medi.evaluation.verdict import Evidence, answer, patients_needed, verdict
from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import NOT_ESTIMABLE
from latent_medi.statistics.kernel_distance import kid_text


def difference(value, interval, likely):
    return Difference(value, 100, 20, interval, likely=likely)


CLEAR = difference(0.06, (0.01, 0.11), (0.03, 0.09))
PROBABLE = difference(0.04, (-0.01, 0.09), (0.01, 0.07))
OPEN = difference(0.02, (-0.03, 0.07), (-0.01, 0.05))
BEHIND = difference(-0.01, (-0.06, 0.04), (-0.04, 0.02))
WORSE = difference(-0.04, (-0.09, 0.01), (-0.07, -0.01))
FEW = difference(0.3, NOT_ESTIMABLE, NOT_ESTIMABLE)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([CLEAR, CLEAR], "useful"),
        ([CLEAR, PROBABLE], "may be useful"),
        ([PROBABLE, OPEN], "not shown"),
        ([CLEAR, BEHIND], "not shown"),
        ([CLEAR, WORSE], "not useful"),
        ([OPEN, WORSE], "not useful"),
        ([CLEAR, FEW], "no verdict"),
        ([FEW, BEHIND], "no verdict"),
        ([FEW, WORSE], "not useful"),
        ([CLEAR, difference(0.0, None, None)], "no verdict"),
        ([CLEAR, difference(-0.01, (-0.04, 0.02), (-0.02, 0.0))], "not shown"),
        ([CLEAR, difference(0.01, (0.0, 0.02), (0.0, 0.02))], "not shown"),
    ],
)
def test_the_weakest_difference_decides(differences, expected):
    assert answer(differences) == expected
    assert answer(differences[::-1]) == expected


@pytest.mark.parametrize("differences", [[], [CLEAR, difference(None, None, None)]])
def test_no_answer_without_differences(differences):
    with pytest.raises(ValueError, match="at least one difference"):
        answer(differences)


def evidence(differences, reasons=(), missing=()):
    return Evidence("MeDi", 0.814, differences, list(missing), list(reasons))


def test_a_sentence_says_of_which_models_it_speaks_and_against_what():
    useful = verdict(evidence({"stain transfer": CLEAR, "oversampling": CLEAR}))
    assert useful.answer == "useful"
    assert useful.sentence == (
        "MeDi is useful here with these trained models: accuracy under shift is 0.814, +0.060 against stain transfer "
        "[+0.010, +0.110]."
    )
    assert useful.reasons == []
    of_method = replace(CLEAR, over="method", training_seeds=3)
    assert (
        "useful here as a method, over 3 training seeds: " in verdict(evidence({"stain transfer": of_method})).sentence
    )
    likely = verdict(evidence({"stain transfer": CLEAR, "oversampling": PROBABLE})).sentence
    assert "may be useful here with these trained models, though" in likely
    assert "does not exclude chance against oversampling: accuracy" in likely
    assert "does not exclude chance: accuracy" in verdict(evidence({"stain transfer": PROBABLE})).sentence
    unseen = verdict(evidence({"stain transfer": replace(OPEN, smallest_group=14, error_patients=0.025)}))
    assert unseen.answer == "not shown"
    assert unseen.sentence.startswith("It is not shown that MeDi is useful here with these trained models")
    assert "since it is not ahead of stain transfer beyond chance: accuracy" in unseen.sentence
    assert "to see a difference of 0.05, about 28 patients of each class are needed." in unseen.sentence
    many = verdict(evidence({"stain transfer": replace(OPEN, smallest_group=56, error_patients=0.012)}))
    assert many.sentence.endswith("; the 56 patients of each class are enough to see a difference of 0.05.")
    at = replace(
        evidence({"stain transfer": CLEAR, "oversampling": BEHIND, "reweighting": OPEN}), group="per class at S"
    )
    unbeaten = verdict(at).sentence
    assert "since it is not ahead of oversampling or reweighting beyond chance: accuracy" in unbeaten
    worse = replace(BEHIND, smallest_group=14, error_patients=0.05)
    both = {"oversampling": replace(OPEN, smallest_group=14, error_patients=0.025), "reweighting": worse}
    assert "about 110 patients per class at S are needed." in verdict(replace(at, differences=both)).sentence
    behind = verdict(evidence({"stain transfer": BEHIND, "oversampling": WORSE, "reweighting": CLEAR}))
    assert behind.answer == "not useful"
    assert behind.sentence.endswith("; oversampling does better (-0.040, 80 % interval -0.070 to -0.010).")


def test_patients_needed_by_hand():
    """n·((1.96 + 0.84)·SE/0.05)², by the patients of the smallest class: 20·(2.8·0.05/0.05)² = 156.8."""
    assert patients_needed(replace(OPEN, smallest_group=20, error_patients=0.05)) == math.ceil(156.8)
    assert patients_needed(replace(OPEN, smallest_group=20, error_patients=0.001)) == 10
    assert patients_needed(replace(OPEN, smallest_group=3, error_patients=None)) == 10


@pytest.mark.parametrize("difference", [CLEAR, PROBABLE, OPEN, BEHIND, WORSE, FEW])
def test_a_reason_against_a_verdict_outweighs_every_answer(difference):
    found = verdict(evidence({"stain transfer": difference}, ["the samples are noise", "3 patients are too few"]))
    assert found.answer == "no verdict"
    assert found.sentence == "No verdict on MeDi: the samples are noise; 3 patients are too few."
    assert found.reasons == ["the samples are noise", "3 patients are too few"]


def test_no_verdict_without_a_comparison_or_the_decisive_baseline():
    assert "no downstream comparison" in verdict(evidence({})).sentence
    assert "no downstream comparison" in verdict(replace(evidence({"x": CLEAR}), score=None)).sentence
    untried = verdict(evidence({"oversampling": CLEAR}, missing=["stain transfer"]))
    assert untried.reasons == ["stain transfer was not tried"]
    assert verdict(evidence({"oversampling": WORSE}, missing=["stain transfer"])).answer == "not useful"


def test_an_interval_that_is_not_estimable_is_no_verdict_with_its_reason():
    unknown = replace(FEW, reason="generate at least twice as many samples as are added")
    found = verdict(evidence({"stain transfer": CLEAR, "oversampling": unknown}))
    assert found.answer == "no verdict"
    assert found.reasons == ["generate at least twice as many samples as are added"]
    # The patients' own variance says how many are needed, also where the noise of the draws is not known.
    found = verdict(evidence({"oversampling": replace(unknown, smallest_group=14, error_patients=0.025)}))
    assert found.reasons == ["generate at least twice as many samples as are added"]
    assert found.sentence.endswith("; to see a difference of 0.05, about 28 patients of each class are needed.")
    unsaid = verdict(evidence({"oversampling": FEW}))
    assert unsaid.reasons == ["the interval of its difference from oversampling is not estimable"]


# What an evaluation says.


@pytest.fixture
def changed(metrics):
    return copy.deepcopy(metrics)


def said(content):
    return headline(metrics_of(content)).verdict


def test_a_planted_gain_is_found(metrics):
    assert said(metrics).answer in ("useful", "may be useful")
    assert metrics["headline"]["verdict"]["sentence"] == said(metrics).sentence


def test_too_few_patients(changed):
    changed["downstream"]["filters"]["test_patients"]["stripes"] = 3
    found = said(changed)
    assert found.answer == "no verdict"
    assert "3 test patients of stripes at" in found.sentence
    assert "too few: 10 are needed for an interval" in found.sentence
    changed["downstream"]["filters"]["test_patients"]["stripes"] = 10
    assert said(changed).answer != "no verdict"


def test_one_patient_is_too_few(changed):
    changed["downstream"]["filters"]["test_patients"]["stripes"] = 1
    assert "No verdict on MeDi: 1 test patient of stripes at south is too few: 10 are" in said(changed).sentence
    changed["downstream"]["filters"]["test_patients"]["rings"] = 2
    assert "2 test patients of rings and 1 test patient of stripes at south are too few" in said(changed).sentence


def test_where_patients_are_needed(results):
    downstream = results.downstream["filters"]
    fields = {results.dataset.class_field, results.dataset.site_field}
    by_class = [c for c in downstream.combinations if set(c.combination) == fields]
    assert 0 < len(by_class) < len(downstream.combinations)
    assert patient_group(results, downstream) == patient_group(results, None) == "of each class"
    assert patient_group(results, replace(downstream, combinations=by_class)) == "per class at south"


def test_an_oracle_without_help(changed):
    differences = changed["downstream"]["filters"]["differences"]
    gain = differences["oracle"]["real"]["accuracy_shift"]
    gain |= {"value": 0.01, "interval": [-0.03, 0.05], "likely": [-0.01, 0.03]}
    for difference in differences["medi"].values():
        difference["accuracy_shift"] |= {"value": 0.05, "interval": [0.01, 0.09], "likely": [0.03, 0.07]}
    assert said(changed).answer == "useful"  # what is clear for itself needs no oracle
    differences["medi"]["stain_transfer"]["accuracy_shift"]["interval"] = [-0.01, 0.11]
    assert said(changed).reasons == [
        "it is not shown that real patches of the unseen combinations help the classifier (oracle +0.010 against the "
        "real patches alone, 80 % interval -0.010 to +0.030)"
    ]
    differences["medi"]["stain_transfer"]["accuracy_shift"]["interval"] = [0.01, 0.09]
    gain |= {"value": -0.01}
    assert "combinations do not help the classifier (oracle -0.010 against the real" in said(changed).sentence
    del differences["oracle"]
    assert said(changed).answer == "useful"


def test_samples_far_from_tissue(changed):
    tissue = changed["fidelity"]["filters"]["tissue"]["medi"]
    assert 0 <= tissue["value"] + 0.1 * tissue["other_combinations"] < 0.5 * tissue["other_combinations"]
    tissue["value"] = tissue["other_combinations"]
    found = said(changed)
    assert found.answer == "no verdict"
    raw, shown = f"(KID {tissue['value']:.3g})", f"(KID × 10³ {kid_text(tissue['value'])})"
    assert f"no nearer to real patches of the unseen combinations {raw}" in found.sentence
    # Files have distances as they are, people read thousandths.
    read = metrics_of(changed)
    text = headline_text(read, headline(read))
    assert shown in text
    assert raw not in text
    assert raw in str(headline_json(headline(read))["verdict"])
    changed["fidelity"]["filters"]["tissue"] = {}
    assert said(changed).answer != "no verdict"


def test_samples_that_do_not_show_what_was_asked_for(changed):
    fields = changed["adherence"]["filters"]["fields"]["class"]
    halfway = (fields["chance"] + fields["real"]["value"]) / 2
    fields["synthetic"]["medi"]["value"] = halfway - 0.01
    found = said(changed)
    assert found.reasons == [
        f"its samples of unseen combinations show the requested class in {halfway - 0.01:.0%}, real patches in "
        f"{fields['real']['value']:.0%}"
    ]
    fields["synthetic"]["medi"]["value"] = halfway + 0.01
    assert said(changed).answer != "no verdict"
    fields["synthetic"]["medi"]["value"], fields["real"]["value"] = 0.0, fields["chance"] + 0.05  # it cannot tell
    assert said(changed).answer != "no verdict"


def test_a_field_that_was_not_asked_for_need_not_be_shown(changed):
    fields = changed["adherence"]["filters"]["fields"]["site"]
    fields["synthetic"]["medi"] |= {"value": fields["chance"]}
    assert "show the requested site in" in said(changed).sentence
    fields["synthetic"]["medi"]["conditioned"] = False
    assert said(changed).answer != "no verdict"


def test_lost_variety_stands_beside_what_is_found(metrics):
    record = headline(metrics_of(metrics))
    overall = metrics["fidelity"]["filters"]["overall"]
    assert record.variety.recall == overall["medi"]["recall"]
    assert record.variety.recall_real == overall["real"]["recall"]
    assert record.variety.coverage_real == overall["real"]["coverage"]
    assert headline_json(record)["variety"]["coverage"] == overall["medi"]["coverage"]
    lines = headline_text(metrics_of(metrics), record).splitlines()
    assert lines[-1] == record.verdict.sentence
    assert any(line.split()[:1] == ["recall,"] and f"{record.variety.recall:.3f}" in line for line in lines)
