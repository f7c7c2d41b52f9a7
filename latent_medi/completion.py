"""Completion of words in the shell, by argcomplete: verbs, settings, choices and packaged configurations.

``eval "$(register-python-argcomplete latent-medi)"`` switches it on in bash and zsh. Where nothing of ours fits, as for
a path, the shell completes files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

from latent_medi.core.config import packaged_names
from latent_medi.core.kinds import arguments, find, hints, origin, plain, settings_in
from latent_medi.recipes.registry import recipes
from latent_medi.verbs import VERBS, Verb, found_verb


def completions(words: Sequence[str], prefix: str) -> list[str]:
    """What a word may become.

    Args:
        words: The words between ``latent-medi`` and it.
        prefix: The word as far as it is written.
    """
    found = [word for word in _candidates([word for word in words if word], prefix) if word.startswith(prefix)]
    group = found[0][:-1] if len(found) == 1 and found[0].endswith(".") else ""
    return completions(words, group) if group and group != prefix else found


def _candidates(words: list[str], prefix: str) -> Iterator[str]:
    if not words:
        yield from [*(name for name in VERBS if " " not in name), "--help", "--version"]
        return
    name, rest = found_verb(words)
    if not rest:
        yield from (verb.partition(" ")[2] for verb in VERBS if verb.startswith(f"{name} "))
        if name == "shards":
            yield from recipes()
    if name not in VERBS or not (verb := Verb(*VERBS[name])).settings:
        return
    settings_class = verb.settings_class()
    last = rest[-1] if rest else ""
    if last == "--config":
        yield from packaged_names()
    elif last == "--help":
        yield from _names(settings_class, prefix)
    elif last == "--json" or (last.startswith("--") and find(settings_class, last[2:])):  # what comes is its value
        yield from _values(settings_class, last[2:])
    elif "=" in prefix:
        key = prefix.partition("=")[0]
        yield from (f"{key}={value}" for value in _values(settings_class, key.removeprefix("--")))
    elif prefix.startswith("--"):
        yield from ("--config", "--json", "--help")
        yield from (f"--{name}" for name in _names(settings_class, prefix[2:]))
    else:
        yield from _values(settings_class, _list_before(rest))
        yield from (f"{name}=" for name in _names(settings_class, prefix))


def _names(settings_class: type, prefix: str, before: str = "") -> Iterator[str]:
    """The settings, and those of a group whose name is complete."""
    for name, annotation in hints(settings_class).items():
        group = settings_in(annotation)
        if group is None:
            yield before + name
        elif prefix.startswith(f"{before}{name}"):
            yield from _names(group, prefix, f"{before}{name}.")
        else:
            yield f"{before}{name}."


def _values(settings_class: type, key: str) -> list[str]:
    """The words that a setting takes: choices, truth values, packaged configurations."""
    if key == "config":
        return packaged_names()
    found = find(settings_class, key) if key else None
    annotation: Any = found[1] if found else None
    if origin(annotation) is list:
        annotation = arguments(annotation)[0]
    if plain(annotation) is bool:
        return ["true", "false"]
    if not arguments(annotation) or origin(annotation) in (list, dict, tuple):
        return []
    return [word for word in arguments(annotation) if isinstance(word, str) and word]


def _list_before(words: Sequence[str]) -> str:
    """The setting whose list goes on after the last word: ``--filters copies outliers``."""
    for word in reversed(words):
        if word.startswith("--"):
            return word[2:] if "=" not in word else ""
        if "=" in word:
            return ""
    return ""


def complete() -> None:
    """Print what the word at the cursor may become, for the shell, and end the process."""
    import argcomplete

    class Finder(argcomplete.CompletionFinder):
        def collect_completions(self, active_parsers: Any, parsed_args: Any, cword_prefix: str) -> list[str]:
            line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
            words = argcomplete.split_line(line, point)[3][int(os.environ["_ARGCOMPLETE"]) :]
            found = completions(words, cword_prefix)
            self._display_completions = dict.fromkeys(found, "")  # zsh shows a description
            return found

    Finder()(argparse.ArgumentParser(add_help=False))
