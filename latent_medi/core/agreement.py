"""Launched processes agree before any of them begins: on their settings, and on the content of what they read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from latent_medi.core.errors import UserError

_SHOWN = 5


class Told:
    """What one process is about to do."""

    def __init__(self, alone: bool) -> None:
        self._alone = alone
        self.inputs: dict[str, tuple[str, str]] = {}
        self.settings: dict[str, Any] = {}

    def reads(self, name: str, path: object, content: Callable[[], str]) -> None:
        """Tell of an input: only its content must be the same everywhere.

        Args:
            name: The setting that names it.
            path: Where this process reads it.
            content: Gives a hash of all of it that matters; not called in a process alone.
        """
        if not self._alone:
            self.inputs[name] = (str(path), content())

    def does(self, settings: object, but: Collection[str] = (), prefix: str = "") -> None:
        """Tell of settings, a dataclass or a mapping.

        Args:
            settings: What must be the same everywhere.
            but: Names at the top that are told as inputs, or may differ.
            prefix: Put before each name.
        """
        if self._alone:
            return
        values = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
        assert isinstance(values, Mapping)
        self.settings |= flat({name: value for name, value in values.items() if name not in but}, prefix)


@contextmanager
def agreed(accelerator: Accelerator | None) -> Iterator[Told]:
    """Prepare work in the body, and go on after it only if every process is about to do the same.

    Every process must enter, and the body must not wait for the others. An error of one process in the body ends all of
    them at once, instead of leaving the others to wait for it.

    Args:
        accelerator: The processes; ``None`` for one.

    Yields:
        Takes what is compared.

    Raises:
        UserError: In every process alike: names what differs and where; or the error of another process.
    """
    if accelerator is None or accelerator.num_processes == 1:
        yield Told(alone=True)
        return
    told, error = Told(alone=False), None
    try:
        yield told
    except Exception as caught:
        error = caught
    failed = "" if error is None else str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    everyone = gather_object([(failed, told.inputs, told.settings)])
    if error is not None:
        raise error
    for process, (theirs, *_) in enumerate(everyone):
        if theirs:
            raise UserError(f"Process {process} cannot begin: {theirs}")
    differences = _differences([inputs for _, inputs, _ in everyone], [settings for *_, settings in everyone])
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"The {len(everyone)} processes were not started alike: {'; '.join(differences[:_SHOWN])}{more}.",
            "Start every process with the same command. A folder that each node has a copy of must have the same "
            "content everywhere.",
        )


def _differences(inputs: list[dict[str, tuple[str, str]]], settings: list[dict[str, Any]]) -> list[str]:
    """What differs from the first process, inputs first: a phrase for each."""
    found = []
    for name in dict.fromkeys(name for each in inputs for name in each):
        path, content = inputs[0].get(name, ("", ""))
        for process, each in enumerate(inputs):
            its_path, its_content = each.get(name, ("", ""))
            if its_content != content:
                where = "the same path" if its_path == path else its_path or "nothing"
                found.append(
                    f"{name} is {path or 'nothing'} in process 0, and {where} with other content in process {process}"
                )
                break
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name) for each in settings]
        process = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if process:
            found.append(
                f"{name} is {_short(values[0])} in process 0, and {_short(values[process])} in process {process}"
            )
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, entry in value.items():
        result |= flat(entry, f"{prefix}.{key}" if prefix else str(key))
    return result
