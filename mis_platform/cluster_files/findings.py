"""What is wrong with a file, in one line: where, what, and what to write instead."""

from dataclasses import dataclass
from typing import Any

ERROR, WARNING = "error", "warning"
LONGEST = 300  # characters of one part of a line

Path = tuple[str | int, ...]  # where in a document: keys and positions in lists


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for a person. where: keys of the document, or as text; empty for the whole file. Holds no secret."""

    file: str
    where: Path | str
    problem: str
    remedy: str
    severity: str = ERROR

    @property
    def key(self) -> str:
        """`("spec", "containers", 0, "image")` as `spec.containers.0.image`."""
        return self.where if isinstance(self.where, str) else ".".join(map(str, self.where))

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else self.file
        return f"{_one_line(place)}: {self.severity}: {_one_line(self.problem)}; {_one_line(self.remedy)}"


def shown(value: Any) -> str:
    """A value of the file as a message may quote it: short."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(text: str) -> str:
    """No newline or escape sequence of a file reaches a terminal."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return printable if len(printable) <= LONGEST else f"{printable[: LONGEST - 3]}..."
