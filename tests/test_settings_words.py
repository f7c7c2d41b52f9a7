"""What people write reaches the settings as they wrote it, or is refused in words of ours."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import latent_medi
from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.core.kinds import hints
from latent_medi.core.paths import PATH
from latent_medi.metadata.settings import AuditSettings, SplitSettings
from latent_medi.planning.settings import PlanSettings
from latent_medi.sampling.settings import GenerateSettings, TranslateSettings


def settings_classes() -> list[type]:
    """Every settings dataclass of the package."""
    found = []
    for module in pkgutil.walk_packages(latent_medi.__path__, "latent_medi."):
        if module.name.endswith("settings"):
            there = vars(importlib.import_module(module.name)).values()
            found += [c for c in there if dataclasses.is_dataclass(c) and c.__module__ == module.name]
    return sorted(set(found), key=lambda c: c.__name__)


CLASSES = settings_classes()
# `config` is a word of the command line itself: a class that has it as a setting occurs inside others alone.
TOP_CLASSES = [c for c in CLASSES if "config" not in {f.name for f in dataclasses.fields(c)}]

# ---- labels

YAML_WORDS = [
    "1", "01", "010", "-0", "+1", "1e3", "1.0", "1.50", "1_000", "0x1F", "1:30", ".inf", ".nan", "nan", "inf", "NO",
    "no", "yes", "on", "Off", "y", "true", "True", "null", "Null", "~", "2020-01-01", "=", "<<", "-", "8", "<5% TIL",
    "G3+4", "black/african american", "St. Mary's", "Klinikum Köln", "'--", "😀", "a=b", "a.b", "\x7f", "$HOME", "~x",
    "a #b", "c: d", "[a]", "{a}", '"q"', "'q'", "*a", "&a", "!a", "%a", "@a", "a, b", "a\tb", " a ",
]  # fmt: skip


def shown(call: Any) -> Any:
    try:
        return call()
    except UserError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.sampled_from(YAML_WORDS), st.text(min_size=1, max_size=8)))
@example("null")
@example("\x0c[")
@example("\r[")
def test_a_label_comes_through_every_way_unchanged_or_is_to_be_quoted(label: str) -> None:
    quoted = yaml.safe_dump(label, default_style='"', allow_unicode=False, width=10**6).strip()
    want = {"class": label}
    # On the command line, as words of their own.
    for words in (["--class=" + label], ["--class", label]) if not label.startswith("--") else (["--class=" + label],):
        words = config.under("fields", GenerateSettings, words)
        assert config.parse(GenerateSettings, words).fields == want
    if not label.startswith(("--", "[")):
        assert config.parse(SplitSettings, ["--sites", label, "second"]).sites == [label, "second"]
    # Quoted in YAML, on the command line and in mappings of every depth.
    assert config.parse(AuditSettings, [f"requested=[{{class: {quoted}}}]"]).requested == [want]
    assert config.parse(PlanSettings, [f"only.class=[{quoted}]"]).only == {"class": [label]}
    assert config.parse(GenerateSettings, [f"fields.class={quoted}"]).fields == want
    assert config.parse(TranslateSettings, [f"to.class={quoted}"]).to == want
    # As a plain word of YAML, where it is one.
    try:
        node = yaml.compose(f"[{{class: {label}}}]", Loader=yaml.SafeLoader)
        plain = node.value[0].value[0][1].value == label and len(node.value[0].value) == 1 and len(node.value) == 1
    except (yaml.YAMLError, AttributeError, IndexError, TypeError):
        plain = False
    if plain:
        read = shown(lambda: config.parse(AuditSettings, [f"requested=[{{class: {label}}}]"]).requested)
        assert read == [want] or (isinstance(read, UserError) and "quote it" in str(read))


@pytest.mark.parametrize("label", ["1", "01", "010", "NO", "yes", "1e3", "2020-01-01", "1.50", "true", "True", "-0"])
def test_a_label_of_a_file_is_the_text_that_stands_there(label: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        f"hold_out:\n  - {{class: 1, site: {label}}}\nsites: [{label}]\nhold_out_fractions: {{{label}: 1}}\n"
    )
    read = config.parse(SplitSettings, ["--config", str(file)])
    assert (read.hold_out, read.sites) == ([{"class": "1", "site": label}], [label])
    assert read.hold_out_fractions == {label: 1.0}
    config.save_settings(read, tmp_path / "again.yaml")
    assert config.parse(SplitSettings, ["--config", str(tmp_path / "again.yaml")]) == read


def test_labels_inside_the_settings_of_an_experiment_stay_text(tmp_path: Path) -> None:
    from latent_medi.experiment.settings import ExperimentSettings
    from latent_medi.experiment.shift_settings import ShiftSettings

    file = tmp_path / "e.yaml"
    file.write_text("held_out: [{class: 01, site: NO}]\nevaluate: {held_out: [{class: 01, site: NO}], repeats: 3}\n")
    read = config.parse(ExperimentSettings, ["--config", str(file), "train.max-steps=7", "evaluate.weights.a-b=w"])
    assert read.held_out == read.evaluate["held_out"] == [{"class": "01", "site": "NO"}]
    assert read.train == {"max_steps": 7}
    assert read.evaluate["weights"] == {"a-b": "w"}
    with pytest.raises(UserError, match=r"evaluate\.repeats is 'many'; it takes a whole number"):
        config.parse(ExperimentSettings, ["evaluate.repeats=many"])
    changes = config.parse(ShiftSettings, ["changes.held_out=[{class: 01}]", "changes.train.lr=1e-3"]).changes
    assert config.build(ExperimentSettings, changes).held_out == [{"class": "01"}]
    assert config.build(ExperimentSettings, changes).train == {"lr": 1e-3}


def test_a_null_label_is_to_be_quoted() -> None:
    with pytest.raises(UserError, match=r'hold_out\[0\]\.site is empty \(null\).*\n.*quote it: site: "null"'):
        config.parse(SplitSettings, ["hold_out=[{class: a, site: null}]"])


@pytest.mark.parametrize(
    ("text", "seed"), [("7", 7), ("-3", -3), ("1_000", 1000), ("1e3", 1000), ("1000.0", 1000), ("+5", 5), ('"7"', 7)]
)
def test_numbers_may_be_written_in_any_usual_way(text: str, seed: int) -> None:
    assert config.parse(SplitSettings, [f"seed={text}"]).seed == seed


@pytest.mark.parametrize("text", ["010", "1.5", "1:30", "many", "true", "[1]", "", "1e400", ".nan"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"seed is .*; it takes a whole number"):
        config.parse(SplitSettings, [f"seed={text}"])


# ---- names of fields


def test_names_with_dots_and_blanks_are_words_of_the_command_line() -> None:
    words = ["--demographic.race", "white", "--tumor grade", "G3+4", "--n.stage=N0", "--sampler.steps", "3", "n=2"]
    read = config.parse(GenerateSettings, config.under("fields", GenerateSettings, words))
    assert read.fields == {"demographic.race": "white", "tumor grade": "G3+4", "n.stage": "N0"}
    assert (read.sampler.steps, read.n) == (3, 2)
    read = config.parse(
        GenerateSettings, ["fields={demographic.race: white, 'a=b': c}", "guidance.scales.demographic.race=2"]
    )
    assert read.fields == {"demographic.race": "white", "a=b": "c"}
    assert read.guidance.scales == {"demographic.race": 2.0}
    assert config.parse(PlanSettings, ["only.demographic.race=[white, 01]"]).only == {
        "demographic.race": ["white", "01"]
    }
    assert config.parse(PlanSettings, ["--only.demographic.race", "white", "01"]).only == {
        "demographic.race": ["white", "01"]
    }
    words = ["--to", "demographic.race=white", "--where", "days to.death=3", "where.patient=017"]
    read = config.parse(TranslateSettings, words)
    assert (read.to, read.where) == ({"demographic.race": "white"}, {"days to.death": "3", "patient": "017"})


def test_a_field_that_is_written_like_a_setting_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown setting 'tumor grade'.*\n.*--'tumor grade' VALUE"):
        config.parse(GenerateSettings, config.under("fields", GenerateSettings, ["tumor grade=G3+4"]))


# ---- paths


NO_PATH = {
    # Names, choices and addresses whose documentation speaks of files and folders; columns are none anyway.
    "AuditSettings": {"split"},
    "CorpusSettings": {"recipe"},
    "ExperimentSettings": {"recipe"},
    "ImportSettings": {"pattern", "dask", "name", "codec"},
    "JoinSettings": {"name", "names", "unlabelled"},
    "LoraSettings": {"targets"},
    "SlideSettings": {"name", "codec"},
    "SplitSettings": {"allow_duplicates"},
    "GenerateSettings": {"name"},
    "TranslateSettings": {"name"},
}
_SAYS_PATH = re.compile(r"\b(files?|folders?|paths?|PNG|CSV|HTML|URL|hub)\b", re.IGNORECASE)


def documented(settings_class: type) -> dict[str, str]:
    """What the docstring says of each setting."""
    _, _, text = (settings_class.__doc__ or "").partition("Args:")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return {name: " ".join(told.split()) for name, told in entries}


def texts_of(annotation: Any) -> list[bool]:
    """Of every text in an annotation, whether it is marked as a path."""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *marks = typing.get_args(annotation)
        return [PATH in marks] if base is str else texts_of(base)
    if annotation is str:
        return [False]
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        inner = inner[1:]
    return [] if typing.get_origin(annotation) is Literal else [mark for one in inner for mark in texts_of(one)]


@pytest.mark.parametrize("settings_class", CLASSES)
def test_every_setting_that_is_documented_as_a_path_is_one(settings_class: type) -> None:
    told = documented(settings_class)
    for name, annotation in typing.get_type_hints(settings_class, include_extras=True).items():
        marked = texts_of(annotation)
        if any(marked):
            assert all(marked), name
        elif marked and not name.endswith(("_column", "_field")) and _SAYS_PATH.search(told.get(name, "")):
            assert name in NO_PATH.get(settings_class.__name__, ()), f"{name}: {told[name]}"


def test_home_and_variables_are_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_medi.evaluation.settings import EvaluateSettings
    from latent_medi.experiment.settings import ExperimentSettings
    from latent_medi.shards.settings import ImportSettings

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    file = tmp_path / "s.yaml"
    file.write_text(
        "real: ~/real\nsynthetic: {medi: $SCRATCH/m}\nencoders: [~/e, demo]\nweights: {uni: '${SCRATCH}/u'}\n"
    )
    read = config.parse(EvaluateSettings, ["--config", "~/s.yaml", "synthetic.cls=~/c", "--out=~", "cache=a/~/b"])
    assert (read.real, read.out, read.cache) == (f"{tmp_path}/real", str(tmp_path), "a/~/b")
    assert read.synthetic == {"medi": "/scratch/m", "cls": f"{tmp_path}/c"}
    assert (read.encoders, read.weights) == ([f"{tmp_path}/e", "demo"], {"uni": "/scratch/u"})
    told = config.parse(
        ExperimentSettings, ["models.medi.folder=~/m", "train.init_from=$SCRATCH/i", "title=~ costs $5 $SCRATCH"]
    )
    assert (told.models["medi"].folder, told.train) == (f"{tmp_path}/m", {"init_from": "/scratch/i"})
    assert told.title == "~ costs $5 $SCRATCH"
    words = ["table=s3://bucket/$KEY", "dask=tcp://$HOST:1", "pattern=^a$", "out=a$$HOME", "root=a$5/b$"]
    read = config.parse(ImportSettings, words)
    assert (read.table, read.dask, read.pattern) == ("s3://bucket/$KEY", "tcp://$HOST:1", "^a$")
    assert (read.out, read.root) == ("a$HOME", "a$5/b$")
    config.save_settings(read, tmp_path / "again.yaml")
    assert config.parse(ImportSettings, ["--config", str(tmp_path / "again.yaml")]) == read


@pytest.mark.parametrize("words", [["out=$NO_SUCH/x"], ["--out", "${NO_SUCH}"], ["figure=~/${NO_SUCH}/x"]])
def test_a_variable_that_is_not_set_is_named(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(UserError, match=r"latent-medi plan: (out|figure) is .*\$NO_SUCH is not set"):
        config.parse(PlanSettings, words, "plan")


def test_a_user_without_a_home_is_named() -> None:
    with pytest.raises(UserError, match="~nobody-of-that-name has no home"):
        config.parse(PlanSettings, ["out=~nobody-of-that-name/x"])


# ---- messages

_JARGON = re.compile(
    r"(?i:parser|namespace|<class|nskey|jsonargparse|typehint|expected|add_\w*argument|dataclass|NoneType|"
    r"traceback|annotated|typing\.|subclass)|[A-Z]\w*Settings"
)
WRONG: list[Any] = [
    None, "", "wrong", 7, -1.5, True, ["a"], [["a"]], [None], {"a": "b"}, {"a": {"b": 1}}, {"a": None}, [{"a": [1]}],
]  # fmt: skip


@pytest.mark.parametrize("settings_class", TOP_CLASSES)
def test_a_wrong_value_is_told_in_words_of_ours(settings_class: type, tmp_path: Path) -> None:
    refused = 0
    for key in [f.name for f in dataclasses.fields(settings_class)]:  # nested ones are classes of their own here
        for wrong in WRONG:
            text = yaml.safe_dump(wrong, default_flow_style=True).removesuffix("\n...\n").strip()
            file = tmp_path / "s.yaml"
            file.write_text(yaml.safe_dump({key: wrong}))
            for words, where in ((["--config", str(file)], str(file)), ([f"{key}={text}"], "latent-medi verb")):
                told = shown(lambda words=words: config.parse(settings_class, words, "verb"))
                if not isinstance(told, UserError) or "not given" in str(told):
                    continue
                refused += 1
                assert str(told).startswith(f"{where}: "), told
                assert key in str(told), told
                assert not _JARGON.search(str(told).replace(str(file), "")), told
                assert len(str(told)) < 700, told
    assert refused


def test_a_wrong_word_names_the_choices_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"goal is 'balanse'; it takes one of .*'each'.*\n.*Closest: 'balance'"):
        config.parse(PlanSettings, ["goal=balanse"])
    with pytest.raises(UserError, match=r"a list such as \[a, b\]"):
        config.parse(SplitSettings, ["sites=a"])
    with pytest.raises(UserError, match=r"--out has no value"):
        config.parse(SplitSettings, ["--out", "--data", "x"])
    with pytest.raises(UserError, match=r"--config has no value"):
        config.parse(SplitSettings, ["--config"])


def test_what_is_missing_is_named_all_at_once() -> None:
    from latent_medi.training.settings import TrainSettings

    with pytest.raises(UserError, match=r"^latent-medi train: data and out are not given\."):
        config.parse(TrainSettings, [], "train")


@pytest.mark.parametrize("settings_class", TOP_CLASSES)
def test_help_shows_only_what_the_command_line_takes(settings_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(settings_class, ["--help"], "verb")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: latent-medi verb [--config NAME] [key=value …] [--json FILE]")
    assert not re.search(r"\+ \[|Args:|Annotated|``", shown)
    listed = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert sorted(listed) == sorted([*hints(settings_class), "config", "json", "help"])  # each of them once


# ---- files


def refusal(file: Path | str) -> str:
    with pytest.raises(UserError) as told:
        config.parse(SplitSettings, ["--config", str(file)])
    return str(told.value)


def test_bases_that_go_round_in_a_circle_are_named(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"base: {one}\n")
    assert "is based on itself" in refusal(one)
    one.write_text(f"base: {two}\n")
    two.write_text(f"base: {tmp_path}/./one.yaml\n")
    assert f"{one} → {two}" in refusal(one)
    two.write_text("base: no/such\n")
    assert str(two) in refusal(one)
    assert "no/such" in refusal(one)
    two.write_text("base: [a, b]\n")
    assert "base" in refusal(one)
    two.write_text("seed: 3\nnaem: x\n")
    assert refusal(one).startswith(f"{two}: unknown setting 'naem'; closest: 'name'")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"seed: 1\nname: x\nseed: 2\n", r"the key 'seed' twice \(line 3"),
        (b"fractions: {a: 1, a: 2}\n", r"the key 'a' twice"),
        (b"- a\n- b\n", r"holds a list"),
        (b"just words\n", r"holds a single word"),
        (b"fractions:\n\ttrain: 1\n", r"line 2.*\n.*tabs"),
        (b"sites: [a\n", r"not valid YAML.*line 2"),
        (b"sites: " + b"[" * 5000 + b"]" * 5000, r"nested too deeply"),
        (b"name: \xff\xfe\n", r"not UTF-8.*0xff"),
        (b"name: a\x00b\n", r"not valid YAML"),
        (b"sites: &a [*a]\n", r"holds itself"),
        (b"name: !!python/object/apply:os.system [ls]\n", r"the tag !!python"),
        (
            b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)),
            r"more than 100000 entries",
        ),
    ],
)
def test_a_file_that_is_no_settings_is_one_message(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    told = refusal(file)
    assert re.search(says, told), told
    assert str(file) in told
    assert told.count("\n") < 3


def test_a_byte_order_mark_and_an_empty_file_are_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert config.parse(SplitSettings, ["--config", str(file)]).seed == 3
    file.write_bytes(b"# nothing\n")
    assert config.parse(SplitSettings, ["--config", str(file)]) == SplitSettings()


def test_a_configuration_that_is_no_file_is_one_message(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in refusal(tmp_path / "pipe.yaml")
    assert "is a folder" in refusal(tmp_path)
    assert "cannot be read" in refusal("x" * 5000)
    assert "no configuration" in refusal(tmp_path / "absent.yaml")


# ---- --json


def test_the_json_file_is_found_wanting_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latent_medi import cli

    ran: list[list[str]] = []
    monkeypatch.setitem(cli.VERBS, "audit", (lambda words: ran.append(words) or {"a": 1}, ""))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for words in (["--json"], ["--json", str(tmp_path)], [f"--json={tmp_path}/file/x.json"], ["--json", "$NO_SUCH/x"]):
        assert cli.main(["audit", *words]) == 2, words
        assert capsys.readouterr().err.startswith("error: --json"), words
    assert not ran
    assert cli.main(["audit", "data=x", "--json", "~/new/folder/x.json"]) == 0
    assert (tmp_path / "new" / "folder" / "x.json").read_text() == '{\n  "a": 1\n}\n'
    assert ran == [["data=x"]]
