"""What every settings dataclass inherits: values that it does not accept are refused, and renamed settings are named.

A settings class says in its annotations what each setting accepts, and nothing else checks it::

    @dataclass
    class PlanSettings(Settings):
        goal: Literal["fill_unseen", "each"] = "fill_unseen"  # one of several words
        share: UnitInterval = 0.5                             # a number from 0 to 1
        images: NonNegativeInt = 0                            # a whole number of at least 0
        overlap: Annotated[float, Range(0, 1, below=True)] = 0.0  # at least 0 and below 1
        target: PathText = ""                                 # a path: ~ and $NAME are expanded

        RENAMED: ClassVar = {"floor": "images", "goal=all": "goal=each", "cap": "Use `images` and `share` instead."}

Lists and mappings of such values are checked item by item. A setting that a program, a configuration file or the
command line gives a wrong value raises a ``UserError`` that names the file or command, the setting, the value and
what the setting accepts. Checks that need two settings or the data stay in the function that needs them.

``RENAMED`` maps the old name of a setting to its new one, or to a sentence that says what to do if more than the name
changed. A renamed word of a ``Literal`` is written ``name=old: name=new``. The table belongs to the class that had
the setting: a nested setting is renamed in the nested class. A sentence under ``""`` is the hint where a single value
is given in place of the nested settings. An old name in a file, on the command line or in
:func:`latent_medi.core.config.build` raises a ``UserError`` that names the new one.
"""

from __future__ import annotations

from typing import Annotated

from latent_medi.core.kinds import Range
from latent_medi.core.typed import check

__all__ = [
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Range",
    "Settings",
    "UnitInterval",
]

UnitInterval = Annotated[float, Range(0, 1)]
NonNegativeFloat = Annotated[float, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveInt = Annotated[int, Range(1)]


class Settings:
    """Base class of settings dataclasses. A class may have a table ``RENAMED``, see above.

    Raises:
        UserError: A value that the annotation of its setting does not accept.
    """

    def __post_init__(self) -> None:
        check(self)
