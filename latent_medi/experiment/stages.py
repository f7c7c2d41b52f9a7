"""Stages of an experiment: each is remembered with what it was made from, so that a rerun keeps what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json, read_object, refuse_foreign, remove, set_aside, write_json
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import duration, get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of an experiment.

    Args:
        action: The work; it may itself continue where it was broken off.
        inputs: JSON-able: all that the outcome depends on besides the stages that it needs.
        needs: Names of the stages whose results it reads.
        outputs: Files and folders that it writes, relative to the experiment's folder; without them it is not
            finished.
        by_model: The same by model: each is removed only if what that model depends on has changed.
        extras: The same as ``outputs``, but whether they are written depends on the settings.
        shared: Paths that it writes and other experiments may use too: never removed, and without them it is not
            finished.
        damaged: Lists those of its outputs that are absent or damaged: then it is not finished, and they are removed
            before it runs again.
        mend: What else is needed before it runs again on damaged outputs.
        costly: Whether its outputs took too long to be removed without ``replace``.
        prolongs: Whether its work continues outputs that differ in the length of a training run alone.
    """

    action: Callable[[], Any]
    inputs: Any = None
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    by_model: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    damaged: Callable[[], list[Path]] = list
    mend: Callable[[], None] = lambda: None
    costly: bool = False
    prolongs: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """Everything inside the experiment's folder without which it is not finished."""
        return (*self.outputs, *(path for paths in self.by_model.values() for path in paths))


class Stages:
    """Runs named steps in order, each once.

    Args:
        folder: Folder of the experiment; records go to ``stages/``.
        names: Every stage, in order; the log counts them.
        concerning: Given a record of inputs and a model's name, the part of it that the model's outputs depend on.
        prolonged: Given a record of inputs and the inputs now, the record with the lengths of training runs that are
            longer now.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        concerning: Callable[[Mapping[str, Any], str], Mapping[str, Any]] = lambda made_from, _: made_from,
        prolonged: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = lambda made_from, _: made_from,
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self.concerning = concerning
        self.prolonged = prolonged
        self.seconds: dict[str, float] = {}
        self._stages: dict[str, Stage] = {}

    def add(self, name: str, stage: Stage) -> None:
        """Define a stage, or define it anew.

        Raises:
            UserError: A stage that it needs was not added before it.
        """
        if absent := [needed for needed in stage.needs if needed not in self._stages]:
            raise UserError(
                f"The stage {name!r} needs the stage {absent[0]!r}, which stages does not list before it.",
                "List it; a stage that is finished is not run again.",
            )
        self._stages[name] = stage

    def finished(self, name: str) -> bool:
        """Whether an earlier run finished a stage from the same inputs, and its outputs are complete."""
        record, stage = self._record(name), self._stages[name]
        if record["seconds"] is None or record["made_from"] != self._made_from(name):
            return False
        written = [*stage.shared, *(self.folder / path for path in (*stage.required, *record.get("extras", ())))]
        return all(Path(path).exists() for path in written) and not self.stale(name) and not stage.damaged()

    def check(self, names: Collection[str] | None = None) -> None:
        """Refuse to remove costly outputs: to be called before anything runs. Those of a training run that was shorter
        are no obstacle: they are continued or set aside.

        Args:
            names: Stages to check; by default all.

        Raises:
            UserError: Lists the costly outputs that were made from other inputs than these, and which inputs differ.
        """
        stale: list[str] = []
        differ: dict[str, str] = {}
        for name, stage in self._stages.items():
            asked = names is None or name in names
            if asked and stage.costly and (paths := self.to_remove(name)):
                stale += map(str, paths)
                differ |= _differences(self._record(name)["made_from"], self._made_from(name))
        if stale:
            more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise UserError(
                f"{', '.join(stale)} {'was' if len(stale) == 1 else 'were'} made from other inputs: "
                f"{'; '.join(list(differ.values())[:5]) or 'those of an earlier run'}{more}.",
                f"Choose another out to keep {self.folder} unchanged, or replace=true to remove what no longer fits "
                "and make it anew.",
            )

    def begin(self, *files: str) -> None:
        """Record, before the first stage ever runs, which outputs exist already: those of the user are never removed.

        Args:
            files: What else the experiment writes.

        Raises:
            UserError: A file of the user's would be replaced.
        """
        existing = [path.relative_to(self.folder).as_posix() for name in self._stages for path in self._outputs(name)]
        in_the_way = [name for name in existing if (self.folder / name).is_file()]
        refuse_foreign(self.folder, {"stages": ""}, [*files, *in_the_way])
        if existing and not self._found().parent.is_dir():
            write_json(self._found(), existing)

    def _found(self) -> Path:
        return self.folder / "stages" / "found.json"

    def run(self, *names: str) -> None:
        """Run the stages that are not finished. What an earlier run made from other inputs is removed first; what was
        broken off with the same inputs continues.
        """
        for name in names:
            self._run(name, self._stages[name])

    def _run(self, name: str, stage: Stage) -> None:
        number = f"{self.names.index(name) + 1}/{len(self.names)}"
        before, made_from = self._record(name), self._made_from(name)
        if self.finished(name):
            self.seconds[name] = before["seconds"]
            log.info("%s %s: finished before (took %s), kept", number, name, duration(self.seconds[name]))
            return
        if before["made_from"] is not None:
            if before["made_from"] == made_from and before["seconds"] is not None:
                log.warning("%s %s: its outputs are absent or damaged; it runs again", number, name)
            self._discard(self.to_remove(name))
            self._keep_shorter(self.stale(name))
            self._set_aside([path for path in stage.damaged() if path.exists()])
            stage.mend()
        self._reopen_dependents(name)
        log.info("%s %s …", number, name)
        record = {"made_from": made_from} | ({"models": self._models(name)} if stage.by_model else {})
        write_json(self._file(name), record | {"seconds": None})
        start = time.monotonic()
        stage.action()
        self.seconds[name] = round(time.monotonic() - start, 1)
        extras = [
            file for path in stage.extras for file in sorted([self.folder / path, *(self.folder / path).rglob("*")])
        ]
        written = [str(file.relative_to(self.folder)) for file in extras if file.exists()]
        write_json(self._file(name), record | {"extras": written, "seconds": self.seconds[name]})
        log.info("%s %s: done in %s", number, name, duration(self.seconds[name]))

    def _reopen_dependents(self, name: str) -> None:
        """Record that what is quickly made from a stage's outputs is no longer finished, since these are made again: an
        earlier version may have written them from the same inputs.
        """
        again = {name}
        for other, stage in self._stages.items():
            if not stage.costly and again & set(stage.needs):
                again.add(other)
                if (record := self._record(other))["seconds"] is not None:
                    write_json(self._file(other), record | {"seconds": None})

    def _outputs(self, name: str) -> list[Path]:
        """The outputs of a stage that exist."""
        stage = self._stages[name]
        return [path for output in (*stage.required, *stage.extras) if (path := self.folder / output).exists()]

    def stale(self, name: str) -> list[Path]:
        """The outputs of a stage that exist and were made from other inputs than it has now."""
        return self._not_of_these_inputs(name, self._stages[name].prolongs)

    def outdated(self, name: str) -> list[Path]:
        """The outputs of a stage that exist and were made from other inputs, those of a shorter training run too."""
        return self._not_of_these_inputs(name, longer=False)

    def to_remove(self, name: str) -> list[Path]:
        """The stale outputs of a stage that differ by more than the length of a training run."""
        stage = self._stages[name]
        return self._not_of_these_inputs(name, longer=stage.prolongs or bool(stage.costly and stage.by_model))

    def _not_of_these_inputs(self, name: str, longer: bool) -> list[Path]:
        """The outputs that exist and were made from other inputs; with ``longer`` a training run may be longer now."""
        stage, before = self._stages[name], self._record(name)["made_from"]
        if before is None:
            return []
        fresh = {path for model in self._fresh(name, stage.by_model, longer) for path in stage.by_model[model]}
        if before == self._made_from(name):
            fresh |= {*stage.outputs, *stage.extras}
        return [path for path in self._outputs(name) if path.relative_to(self.folder).as_posix() not in fresh]

    def _fresh(self, name: str, models: Iterable[str], longer: bool = False) -> list[str]:
        """Those of some models whose outputs of a stage, if they exist, were made from the inputs that it has now; with
        ``longer`` a training run may be longer now.
        """
        record, now = self._record(name), self._made_from(name)
        before = self.prolonged(record["made_from"], now) if longer else record["made_from"]
        # Earlier versions did not list the models; they made all outputs from the recorded inputs.
        listed = record.get("models")
        return [
            model
            for model in models
            if (listed is None or model in listed) and self.concerning(before, model) == self.concerning(now, model)
        ]

    def _models(self, name: str) -> list[str]:
        """The models whose outputs are of the inputs that a stage has now, once it has run: its own, and those that
        earlier runs had made from them.
        """
        record, own = self._record(name), list(self._stages[name].by_model)
        earlier = [m for m in record.get("models", ()) if m not in own] if record["made_from"] is not None else []
        return own + self._fresh(name, earlier)

    def _set_aside(self, paths: Sequence[Path]) -> None:
        """Rename damaged outputs; remove a damaged shard, which its hash shows to be none that was written."""
        self._check_own(paths)
        for path in paths:
            if path.suffix == ".tar":
                remove(path)
            else:
                log.warning("%s is damaged, or of another version: it is kept as %s", path, set_aside(path).name)

    def _keep_shorter(self, paths: Sequence[Path]) -> None:
        """Rename outputs that were made with a training run that is longer now: NAME.before."""
        self._check_own(paths)
        for path in paths:
            if path.is_dir():
                with output_lock(path):  # nobody writes it
                    pass
            log.info("%s is of the shorter training run: it is kept as %s", path, set_aside(path, "before").name)

    def _discard(self, paths: Sequence[Path]) -> None:
        """Remove outputs of an earlier run.

        Raises:
            UserError: They existed before that run, or another job is writing them.
        """
        self._check_own(paths)
        for path in paths:
            if path.is_dir():
                with output_lock(path):  # nobody writes it
                    remove(path)
            else:
                remove(path)

    def _check_own(self, paths: Sequence[Path]) -> None:
        """Refuse to touch what existed before the first run."""
        found = [self.folder / path for path in (read_json(self._found()) if self._found().is_file() else [])]
        for path in paths:
            if any(path.is_relative_to(one) for one in found):
                raise UserError(
                    f"{path} does not fit the settings, and no run of this experiment made it.",
                    "Move it to another place, or choose another out.",
                )

    def _file(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any]:
        record = read_object(self._file(name)) if self._file(name).exists() else {}
        return {"made_from": None, "seconds": None, **record}

    def _made_from(self, name: str) -> dict[str, Any]:
        stage = self._stages[name]
        made_from: dict[str, Any] = {}
        for needed in stage.needs:
            made_from |= self._made_from(needed)
        return made_from | {name: stage.inputs}


def _differences(before: Any, after: Any, where: str = "") -> dict[str, str]:
    """What differs between two records, by its dotted place."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            found |= _differences(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
        return found
    return {} if before == after else {where: f"{where} was {_short(before)}, is {_short(after)}"}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"  # a hash
