from typing import Literal, NamedTuple

Level = Literal["ok", "note", "warning", "error"]
"""note: not there, and not needed by all. warning: works, though not as it should. error: commands will fail."""


class Finding(NamedTuple):
    level: Level
    what: str
    found: str
    fix: str = ""
    """What to do, where it is not ok."""
