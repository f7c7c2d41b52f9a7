"""The command line: help for every verb, one clear message and exit code 2 for bad input, a traceback and not 0 for a
crash.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from latent_medi import cli
from latent_medi.core.errors import UserError
from latent_medi.core.kinds import hints, settings_in
from latent_medi.experiment.stages import Stage, Stages
from latent_medi.verbs import found_verb, settings_of

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "shards"])
def test_help_of_every_verb_has_its_common_settings_first_and_two_commands_at_its_end(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_verb([*verb.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    settings_class = cli.VERBS[verb].settings_class()
    common = settings_class.COMMON.split()
    assert {*listed[: len(common)]} >= {name for name in common if settings_in(hints(settings_class)[name]) is None}
    assert text.count("\n") < 100
    commands = text.partition("Examples:")[2].split("\n")
    commands = [shlex.split(command) for command in commands if command.strip()]
    assert len(commands) == 2
    for _, *words in commands:
        name, rest = found_verb(words)
        assert cli.VERBS[name].settings == cli.VERBS[verb].settings
        settings_of(cli.VERBS[name], rest, name)  # each is a command that can be read


def test_help_of_one_setting_says_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in [
        (["train", "--help", "--warmup-images"], ["0 means warmup_fraction of the run", "of at least 0. Default: 0."]),
        (["train", "--help", "model"], ["--model.preset", "--model.fusion"]),
        (["run", "--help", "models"], ["--models.NAME.config PATH", "--models.NAME.sample true|false"]),
        (["run", "--help", "train.model.fusion"], ["'concat', 'additive', 'linear'"]),
        (["run", "--help", "models.medi.config"], ["--models.medi.config PATH", "its training configuration"]),
        (["evaluate", "--help", "weights.uni"], ["--weights.uni PATH", "for encoders that need one"]),
        (["train", "--help", "--config", "demo/medi"], ["Common settings:", "--config NAME"]),
        (["audit", "--help", "my/data"], ["Common settings:", "--config NAME"]),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.run_verb(words)
        assert ended.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())  # lines end where the terminal does
        for text in says:
            assert text in shown
    assert cli.main(["train", "--help", "max_step"]) == 2
    assert "'max_steps'" in capsys.readouterr().err


def test_help_imports_no_large_library() -> None:
    program = (
        "import sys; from latent_medi import cli\n"
        "for verb in cli.VERBS:\n"
        "    try: cli.run_verb([*verb.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'scipy', 'PIL', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_usage_has_a_line_per_verb(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run_verb(["--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines if line} >= {verb.split()[0] for verb in cli.VERBS}
    cli.run_verb(["shards", "--help"])
    shown = capsys.readouterr().out
    assert "prostate" in shown
    assert "  images " in shown


def test_a_command_without_what_it_needs_shows_its_help_and_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run"], ["train"], ["evaluate"], ["shards", "images"], ["shards"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert f"latent-medi {' '.join(words)}" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_bad_input_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", f"data={tmp_path / 'nothing'}", "latents=x", "out=y", "max_steps=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_crash_exits_non_zero_with_its_traceback(tmp_path: Path) -> None:
    """A defect inside a verb must reach the shell: nothing may catch it and end with 0."""
    program = (
        "import sys; from latent_medi import cli\n"
        "def crash(words): raise RuntimeError('planted')\n"
        "cli.VERBS['train'] = (crash, '')\n"
        "sys.exit(cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 2)
    assert "RuntimeError: planted" in done.stderr


def test_a_stage_that_fails_in_a_child_process_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_medi.experiment.commands import run_in_parallel

    with pytest.raises(UserError, match="bad cannot go on; its message is above"):  # no traceback after it
        run_in_parallel({"bad": ["train", "no_such_setting=1"], "good": ["--version"]}, threads=1)
    monkeypatch.setattr(
        "latent_medi.experiment.commands.python_words", lambda *words: [sys.executable, "-c", "raise RuntimeError"]
    )
    with pytest.raises(RuntimeError, match="bad ended with exit code 1"):
        run_in_parallel({"bad": []})


def test_a_finished_stage_is_kept_until_what_it_is_made_from_changes(tmp_path: Path) -> None:
    ran: list[str] = []

    def three(a: int, b: int, c: int) -> list[str]:
        ran.clear()
        stages = Stages(tmp_path, ["a", "b", "c"])
        stages.add("a", Stage(lambda: ran.append("a"), a))
        stages.add("b", Stage(lambda: ran.append("b"), b, needs=("a",)))
        stages.add("c", Stage(lambda: ran.append("c"), c, needs=("b",)))
        stages.run("a", "b", "c")
        return list(ran)

    assert three(1, 1, 1) == ["a", "b", "c"]
    assert three(1, 1, 1) == []
    assert three(1, 1, 2) == ["c"]
    assert three(1, 2, 2) == ["b", "c"]
    assert three(2, 2, 2) == ["a", "b", "c"]


def test_what_is_quickly_made_from_an_output_that_was_lost_is_made_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def three(broken_off: bool = False) -> list[str]:
        ran.clear()

        def evaluate() -> None:
            ran.append("evaluate")
            if broken_off:
                raise RuntimeError("broken off")
            (tmp_path / "metrics").touch()

        stages = Stages(tmp_path, ["evaluate", "report", "train"])
        stages.add("evaluate", Stage(evaluate, 1, outputs=("metrics",)))
        stages.add("report", Stage(lambda: ran.append("report"), 1, needs=("evaluate",)))
        stages.add("train", Stage(lambda: ran.append("train"), 1, needs=("evaluate",), costly=True))
        with contextlib.suppress(RuntimeError):
            stages.run("evaluate", "report", "train")
        return list(ran)

    assert three() == ["evaluate", "report", "train"]
    (tmp_path / "metrics").unlink()
    assert three(broken_off=True) == ["evaluate"]
    assert three() == ["evaluate", "report"]  # what is costly stays
    assert three() == []


def test_what_is_costly_is_not_removed_unasked(tmp_path: Path) -> None:
    def stages(a: dict[str, int], b: int, fails: bool = False) -> Stages:
        def work() -> None:
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / f"{a['steps']}").touch()
            if fails:
                raise RuntimeError("broken off")

        made = Stages(tmp_path, ["train", "other", "sample"])
        made.add("train", Stage(work, a, outputs=("model",), costly=True))
        made.add("other", Stage(lambda: None, b))
        made.add("sample", Stage((tmp_path / "samples").touch, needs=("train",), outputs=("samples",), costly=True))
        return made

    first = stages({"steps": 1, "seed": 0}, 1)
    first.check()
    first.run("train", "other", "sample")
    stages({"steps": 1, "seed": 0}, 2).check()  # what it does not need may change
    changed = stages({"steps": 2, "seed": 0}, 1)
    with pytest.raises(
        UserError, match=r"model, .*samples were made from other inputs: train.steps was 1, is 2\."
    ) as told:
        changed.check()
    assert "replace=true" in told.value.hint
    assert (tmp_path / "model" / "1").is_file()
    assert (tmp_path / "samples").is_file()
    assert stages({"steps": 1, "seed": 0}, 1).finished("sample")

    broken = stages({"steps": 2, "seed": 0}, 1, fails=True)
    with pytest.raises(RuntimeError, match="broken off"):
        broken.run("train")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["2"]
    (tmp_path / "model" / "half").touch()
    stages({"steps": 2, "seed": 0}, 1).run("train", "other", "sample")
    assert (tmp_path / "model" / "half").exists()  # what was broken off with the same inputs goes on


def test_what_others_use_too_is_never_removed_and_missed_if_it_is_gone(tmp_path: Path) -> None:
    ran: list[int] = []
    shared = tmp_path / "elsewhere"

    def stages(number: int) -> Stages:
        def work() -> None:
            ran.append(number)
            shared.touch()

        made = Stages(tmp_path / "out", ["encode"])
        made.add("encode", Stage(work, number, shared=(str(shared),)))
        made.check()
        return made

    stages(1).run("encode")
    stages(1).run("encode")
    assert ran == [1]
    shared.unlink()
    stages(1).run("encode")
    stages(2).run("encode")
    assert ran == [1, 1, 2]
    assert shared.exists()
