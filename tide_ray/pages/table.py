"""Tables that the terminal prints and that pages show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Cells as text. ``marked``: numbers of the rows that stand out; ``words``: what the columns mean; ``wraps``: cells
    may take several lines where there is little room, else only the first column's."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: str = ""
    marked: frozenset[int] = field(default_factory=frozenset)
    wraps: bool = False

    def print(self, console: Console) -> None:
        """The table and what its columns mean."""
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.head):
            table.add_column(name, justify="right" if number else "left", no_wrap=bool(number) and not self.wraps)
        for number, row in enumerate(self.rows):
            first = f"*{row[0]}" if number in self.marked else row[0]
            table.add_row(*map(Text, (first, *row[1:])))  # as text: names are no markup
        console.print(table)
        if self.words:
            console.print(self.words, markup=False, highlight=False)
