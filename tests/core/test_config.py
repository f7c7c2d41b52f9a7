"""Settings: every YAML key can be overridden, an unknown one is refused with the nearest known one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from latent_medi.core import config
from latent_medi.core.errors import UserError


@dataclass
class Network:
    """A network.

    Args:
        width: Channels.
        fields: Names.
    """

    width: int = 4
    fields: list[str] | None = None


@dataclass
class Settings:
    """Settings.

    Args:
        data: Folder.
        lr: Learning rate.
        kind: Kind.
        network: Network.
        held_out: Combinations.
        weights: Files by name.
    """

    data: str
    lr: float = 1e-3
    kind: Literal["a", "b"] = "a"
    network: Network = field(default_factory=Network)
    held_out: list[dict[str, str]] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)


def write(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_later_words_win_over_files_and_files_over_defaults(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {"data": "x", "network": {"width": 8, "fields": ["class"]}})
    second = write(tmp_path / "b.yaml", {"base": first, "lr": 0.5})
    settings = config.parse(Settings, ["--config", second, "network.width=16", "--kind", "b"])
    assert settings == Settings("x", 0.5, "b", Network(16, ["class"]))


def test_entries_of_a_mapping_can_be_set_one_by_one() -> None:
    assert config.parse(Settings, ["data=x", "weights.a=p", "weights.b=q"]).weights == {"a": "p", "b": "q"}
    assert config.parse(Settings, ["data=x", "--weights.phikon-v2", "p"]).weights == {
        "phikon-v2": "p"
    }  # a name, as it is


@pytest.mark.parametrize("words", [["--network.width", "16"], ["--network.width=16"], ["network.width=16"]])
def test_three_spellings_of_an_override(words: list[str]) -> None:
    assert config.parse(Settings, ["data=x", *words]).network.width == 16


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--network.fields", "a", "b"], ["a", "b"]),
        (["--network.fields", "a"], ["a"]),
        (["--network.fields", "1e3", "Ünï", "a=b", "lr=0.5"], ["1e3", "Ünï", "a=b"]),
        (["--network.fields", "a", "b", "--kind", "b"], ["a", "b"]),
        (["--network.fields", "a", "network.width=8"], ["a"]),
        (["--network.fields", "[a, b]"], ["a", "b"]),
        (["network.fields=[a, b]"], ["a", "b"]),
        (["--network.fields", "null"], None),
    ],
)
def test_a_list_of_words_ends_at_the_next_setting(words: list[str], fields: list[str] | None) -> None:
    settings = config.parse(Settings, ["data=x", *words])
    assert settings.network.fields == fields
    assert settings.lr == (0.5 if "lr=0.5" in words else 1e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=x", "netwrk.width=3"], "network.width"),
        (["data=x", "network.widht=3"], "network.width"),
        (["data=x", "lrr=3"], "lr"),
        (["data=x", "--network.fields", "a", "weigths.a=p"], "weights"),  # mistyped right after a list of words
        (["data=x", "--network.fields", "a", "netwrk.width=8"], "network.width"),
        (["data=x", "kind=c"], "kind"),
        (["data=x", "lr=fast"], "lr"),
        (["lr=1"], "data"),
        (["data=x", "--config", "no/such"], "no/such"),
    ],
)
def test_bad_words_are_refused_by_name(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config.parse(Settings, words)


def test_unknown_key_in_a_file_names_file_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", {"data": "x", "network": {"fieldz": []}})
    with pytest.raises(UserError, match=r"bad\.yaml.*'network\.fieldz'.*'network\.fields'"):
        config.parse(Settings, ["--config", path])


def test_saved_settings_give_themselves_again(tmp_path: Path) -> None:
    settings = config.parse(Settings, ["data=x", "network.fields=[class, site]", "held_out=[{class: NA, site: b}]"])
    config.save_settings(settings, tmp_path / "settings.yaml")
    assert config.parse(Settings, ["--config", str(tmp_path / "settings.yaml")]) == settings
    assert settings.held_out == [{"class": "NA", "site": "b"}]


def test_every_packaged_configuration_fits_its_settings() -> None:
    from latent_medi.diffusion.settings import ModelSettings
    from latent_medi.experiment.settings import ExperimentSettings
    from latent_medi.image_classifier.settings import ImageClassifierSettings
    from latent_medi.latent_classifier.settings import ClassifierSettings
    from latent_medi.latents.settings import EncodeSettings
    from latent_medi.training.settings import TrainSettings

    kinds = {"experiment": ExperimentSettings, "encode": EncodeSettings, "classifier": ClassifierSettings}
    kinds |= dict.fromkeys(("vit", "resnet", "demo_classifier"), ImageClassifierSettings)
    kinds |= {"latent_classifier": ClassifierSettings}
    found = 0
    for path in sorted(config.packaged("configs").rglob("*.yaml")):
        if path.parent.name == "accelerate":
            continue
        found += 1
        values = config.load_yaml(path)
        # What data they are for is added.
        if path.parent.name in ("presets", "histodiffusion") or path.stem.endswith("_faithful"):
            values = {"data": "data", "out": "out", **values}
        settings_class = kinds.get(path.stem) or (ExperimentSettings if "models" in values else TrainSettings)
        settings = config.build(settings_class, values)
        models = settings.models.values() if isinstance(settings, ExperimentSettings) else []
        for model in [config.load_yaml(model.config)["model"] for model in models] or [values.get("model")] * (
            "model" in values
        ):
            if settings_class is not ClassifierSettings:
                config.build(ModelSettings, model).resolved()  # channels and preset do not contradict each other
    assert found >= 5


def test_a_dataset_s_own_fields_are_words_of_the_command_line() -> None:
    words = ["--steps", "3", "--grade", "3", "--site=no", "--config", "x.yaml", "n=2", "--flag", "--age", "60"]
    result = config.under("fields", Plain, words)
    assert result == [
        "--steps",
        "3",
        'fields.grade="3"',
        'fields.site="no"',
        "--config",
        "x.yaml",
        "n=2",
        'fields.flag=""',
        'fields.age="60"',
    ]


@dataclass
class Plain:
    """Settings with fields of a dataset.

    Args:
        steps: A number.
        fields: Value by field.
    """

    steps: int = 1
    fields: dict[str, str] = field(default_factory=dict)


def test_nothing_may_be_written_as_null_where_a_setting_is_empty_unless_it_is_given(tmp_path):
    """As earlier versions took it; a label that is called null is quoted."""
    from latent_medi.training.settings import TrainSettings

    file = tmp_path / "a.yaml"
    file.write_text("init_from: null\nlatents:\ndata: x\nlr: 1.0e-05\n")
    settings = config.parse(TrainSettings, ["--config", str(file), "out=null"], "train")
    assert (settings.init_from, settings.latents, settings.out, settings.lr) == ("", "", "", 1e-5)
