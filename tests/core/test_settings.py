"""A settings dataclass refuses values out of range and unknown words, and names the new name of a renamed setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.core.kinds import PartOf, path_settings
from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeInt, PositiveFloat, PositiveInt, Range, Settings, UnitInterval


@dataclass
class Inner(Settings):
    """Nested settings.

    Args:
        steps: Steps.
        form: Form.
    """

    RENAMED: ClassVar = {"n_steps": "steps", "form=square": "form=box"}

    steps: PositiveInt = 1
    form: Literal["box", "ball"] = "box"


@dataclass
class Outer(Settings):
    """Settings.

    Args:
        share: Share.
        overlap: Overlap.
        rate: Rate.
        least: Least number.
        levels: Levels.
        weights: Weights.
        sections: Sections.
        inner: Nested.
        part: Some settings of ``Inner``.
        data: Folder.
        files: Files.
        by_name: Files by name.
    """

    RENAMED: ClassVar = {
        "floor": "least",
        "deals": "inner",
        "cap": "Write the largest number into the table instead.",
        "sections=headline": "sections=summary",
    }

    share: UnitInterval = 0.5
    overlap: Annotated[float, Range(0, 1, below=True)] = 0.0
    rate: PositiveFloat | None = None
    least: NonNegativeInt = 0
    levels: list[UnitInterval] = field(default_factory=list)
    weights: dict[str, UnitInterval] = field(default_factory=dict)
    sections: list[Literal["summary", "cohort"]] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    part: Annotated[dict[str, Any], PartOf(Inner)] = field(default_factory=dict)
    data: PathText = ""
    files: list[PathText] = field(default_factory=list)
    by_name: dict[str, PathText] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("share=1.5", r"share is 1\.5; it takes a number from 0 to 1"),
        ("share=.nan", r"share is .*; it takes a number from 0 to 1"),
        ("overlap=1", r"overlap is 1\.0; it takes a number of at least 0 and below 1"),
        ("rate=0", r"rate is 0\.0; it takes a number above 0, or null"),
        ("rate=.inf", r"rate is Infinity; it takes a number above 0"),
        ("least=-1", r"least is -1; it takes a whole number of at least 0"),
        ("levels=[0.5, 2]", r"levels\[1\] is 2\.0; it takes a number from 0 to 1"),
        ("weights.a=2", r"weights\.a is 2\.0; it takes a number from 0 to 1"),
        ("sections=[summary, cohrt]", r"sections\[1\] is 'cohrt'; .*'summary', 'cohort'.*\n.*Closest: 'cohort'"),
        ("inner.steps=0", r"inner\.steps is 0; it takes a whole number of at least 1"),
        ("part.steps=0", r"part\.steps is 0; it takes a whole number of at least 1"),
    ],
)
def test_a_value_that_a_setting_does_not_accept_is_refused(word: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^latent-medi verb: {says}"):
        config.parse(Outer, [word], "verb")


def test_a_program_is_refused_the_same_values() -> None:
    with pytest.raises(UserError, match=r"^Outer: share is -1; it takes a number from 0 to 1"):
        Outer(share=-1)
    with pytest.raises(UserError, match=r"^Outer: share is empty .null.; it takes a number from 0 to 1"):
        Outer(share=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^Outer: least is \[1\]; it takes a whole number of at least 0"):
        Outer(least=[1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^Inner: form is 'bax'; .*\n.*Closest: 'box'"):
        Inner(form="bax")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^Inner: form is 'square', which was renamed\.\n  Write form=box\."):
        Inner(form="square")  # type: ignore[arg-type]
    assert Outer(share=1, levels=[0, 1], rate=2, sections=["cohort"]).rate == 2


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("floor", 3, r"the setting 'floor' was renamed\.\n  Write least\."),
        ("cap", 3, r"the setting 'cap' was changed\.\n  Write the largest number into the table instead\."),
        ("inner", {"n_steps": 3}, r"the setting 'inner\.n_steps' was renamed\.\n  Write inner\.steps\."),
        ("part", {"n_steps": 3}, r"the setting 'part\.n_steps' was renamed\.\n  Write part\.steps\."),
        ("inner", {"form": "square"}, r"inner\.form is 'square', which was renamed\.\n  Write inner\.form=box\."),
        ("sections", ["headline"], r"sections is 'headline', which was renamed\.\n  Write sections=summary\."),
    ],
)
def test_a_renamed_setting_names_the_new_one_in_a_file_and_in_a_program(
    key: str, value: Any, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(f"{key}: {value}\n")
    with pytest.raises(UserError, match=f"^{file}: {says}"):
        config.parse(Outer, ["--config", str(file)], "verb")
    with pytest.raises(UserError, match=f"^changes: {says}"):
        config.build(Outer, {key: value}, "changes")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["floor=3"], r"'floor' was renamed\.\n  Write least\."),
        (["--floor", "3"], r"'floor' was renamed\.\n  Write least\."),
        (["deals.steps=3"], r"'deals\.steps' was renamed\.\n  Write inner\.steps\."),
        (["inner.n-steps=3"], r"'inner\.n-steps' was renamed\.\n  Write inner\.steps\."),
        (["part.n_steps=3"], r"'part\.n_steps' was renamed\.\n  Write part\.steps\."),
        (["inner.form=square"], r"inner\.form is 'square', which was renamed\.\n  Write inner\.form=box\."),
        (["--sections", "cohort", "headline"], r"sections is 'headline', which was renamed"),
    ],
)
def test_a_renamed_setting_names_the_new_one_on_the_command_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=f"^latent-medi verb: .*{says}"):
        config.parse(Outer, words, "verb")


def test_settings_that_are_paths_are_found_by_their_type() -> None:
    assert path_settings(Outer) == ["data", "files", "by_name"]
