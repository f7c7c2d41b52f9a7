"""Before launched processes begin, they compare their settings and the content of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from latent_medi.core.errors import UserError, shortened

_SHOWN = 5


class Declared:
    """The inputs and settings of one process."""

    def __init__(self, alone: bool) -> None:
        self._alone = alone
        self.inputs: dict[str, tuple[str, str]] = {}
        self.settings: dict[str, object] = {}

    def add_input(self, name: str, path: object, content: Callable[[], str]) -> None:
        """Declare an input. Its path may differ between processes, its content must not.

        Args:
            name: The setting that names the input.
            path: Its path in this process.
            content: Returns a hash of the content; not called if there is only one process.
        """
        if not self._alone:
            self.inputs[name] = (str(path), content())

    def add_settings(self, settings: object, without: Collection[str] = (), prefix: str = "") -> None:
        """Declare settings that must be the same in all processes.

        Args:
            settings: A dataclass or a mapping.
            without: Settings that are declared as inputs, or may differ.
            prefix: Prefix of each name.
        """
        if self._alone:
            return
        values = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
        assert isinstance(values, Mapping)
        self.settings |= flat({name: value for name, value in values.items() if name not in without}, prefix)


@contextmanager
def agreed(accelerator: Accelerator | None) -> Iterator[Declared]:
    """Prepare work in the body; continue after it only if all processes declare the same inputs and settings.

    Every process must enter, and the body must not wait for other processes. If the body fails in one process, all
    processes raise an error.

    Args:
        accelerator: The processes; ``None`` for one.

    Yields:
        The inputs and settings of this process, to be filled in the body.

    Raises:
        UserError: Inputs or settings differ (the message names them), or another process failed.
    """
    if accelerator is None or accelerator.num_processes == 1:
        yield Declared(alone=True)
        return
    declared, error = Declared(alone=False), None
    try:
        yield declared
    except Exception as caught:
        error = caught
    failed = "" if error is None else str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    everyone = gather_object([(failed, declared.inputs, declared.settings)])
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


def _differences(inputs: list[dict[str, tuple[str, str]]], settings: list[dict[str, object]]) -> list[str]:
    """A phrase for each input and setting in which a process differs from the first one."""
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
            first, other = (shortened(repr(values[i])) for i in (0, process))
            found.append(f"{name} is {first} in process 0, and {other} in process {process}")
    return found


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested mappings by their dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    result: dict[str, object] = {}
    for key, entry in value.items():
        result |= flat(entry, f"{prefix}.{key}" if prefix else str(key))
    return result
