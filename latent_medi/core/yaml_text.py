"""Reading YAML without losing text: ``NO`` and ``01`` stay text until a setting takes a truth value or a number."""

from __future__ import annotations

from typing import Any

import yaml

from latent_medi.core.errors import UserError

_TAG = "tag:yaml.org,2002:"
_MOST = 100_000
"""Most entries of a document, with its anchors expanded."""


def read_yaml(text: str, where: str) -> Any:
    """The content of a YAML document: mappings with text keys, lists, and scalars.

    A scalar becomes a number or a truth value only if this program would write that value in the same way (``1``,
    ``0.5``, ``true``). ``null``, ``~`` and an empty scalar become ``None``. Everything else (``01``, ``1e3``, ``NO``, a
    date) stays text, so that no text is lost before the setting's type is known.

    Args:
        text: The document.
        where: Name of the document in messages.

    Raises:
        UserError: The document is no valid YAML, has a key twice, or is nested too deeply or too large; names the line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Reader(where).value(node, ())
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_said(error)}.", _remedy(error, text)) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply.", "Settings have only a few levels.") from None


def one_quoted(text: str) -> str | None:
    """The text in the quotes if a word is one quoted YAML scalar; else ``None``."""
    if text[:1] not in ("'", '"'):
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return None
    if not isinstance(node, yaml.ScalarNode) or node.style not in ("'", '"'):
        return None
    return None if "#" in text[node.end_mark.index :] else str(node.value)


class _Reader:
    def __init__(self, where: str) -> None:
        self.where = where
        self.count = 0

    def value(self, node: yaml.Node, inside: tuple[yaml.Node, ...]) -> Any:
        self.count += 1
        if self.count > _MOST:
            raise self._refusal(node, f"more than {_MOST} entries", "Write out what its anchors (&, *) repeat.")
        if node in inside:
            raise self._refusal(node, "an anchor that holds itself", "Write the value out.")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != _TAG + kind:
            raise self._unknown_tag(node)
        within = (*inside, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, within) for item in node.value]
        return self._mapping(node, within)

    def _mapping(self, node: yaml.Node, within: tuple[yaml.Node, ...]) -> dict[str, object]:
        found: dict[str, object] = {}
        beneath: dict[str, object] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                given = self.value(value, within)
                for entries in reversed(given if isinstance(given, list) else [given]):
                    if not isinstance(entries, dict):
                        raise self._refusal(value, "<< with something that is no mapping", "")
                    beneath |= entries
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._refusal(key, "a key that is no word", "Quote it if it is one.")
            if key.value in found:
                raise self._refusal(key, f"the key {key.value!r} twice", "Leave one of them.")
            found[key.value] = self.value(value, within)
        return {**beneath, **found}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text, tag = str(node.value), node.tag
        if node.style is not None or tag == _TAG + "str":
            return text
        if tag == _TAG + "null":
            return None if text in ("", "~", "null") else text
        if tag == _TAG + "bool":
            return {"true": True, "false": False}.get(text, text)
        if tag == _TAG + "int" and len(text) < 20 and text.lstrip("-").isdigit() and str(int(text)) == text:
            return int(text)
        if tag == _TAG + "float" and any(c.isdigit() for c in text) and ":" not in text and "_" not in text:
            number = float(text)
            # As Python writes numbers, or PyYAML, for which 1e-05 is text.
            return number if text in (repr(number), repr(number).replace("e", ".0e")) else text
        if tag.startswith(_TAG) and tag.removeprefix(_TAG) in ("int", "float", "timestamp", "value", "merge"):
            return text
        raise self._unknown_tag(node)

    def _unknown_tag(self, node: yaml.Node) -> UserError:
        tag = node.tag.replace(_TAG, "!!")
        return self._refusal(node, f"the tag {tag}", "Leave it out, or quote the word if it belongs to it.")

    def _refusal(self, node: yaml.Node, what: str, hint: str) -> UserError:
        return UserError(f"{self.where} has {what} ({_place(node.start_mark)}).", hint)


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _said(error: yaml.MarkedYAMLError) -> str:
    words = [error.context, error.problem] if str(error.problem).startswith("but ") else [error.problem]
    problem = " ".join(" ".join(str(word) for word in words).split())
    return f"{problem} ({_place(error.problem_mark)})" if error.problem_mark is not None else problem


def _remedy(error: yaml.MarkedYAMLError, text: str) -> str:
    lines = text.splitlines()
    if error.problem_mark is not None and error.problem_mark.line < len(lines):
        line = lines[error.problem_mark.line]
        if "\t" in line[: len(line) - len(line.lstrip())] or "\\t" in str(error.problem):
            return "Indent with blanks: YAML does not allow tabs there."
    return "Quote a word that holds any of : # [ ] { } , & * ! | > % @ `, or begins with a quote."
