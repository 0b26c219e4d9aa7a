"""Tables on the command line: as wide as the terminal, and whole where the output is a file or a pipe."""

from rich.console import Console
from rich.table import Table

WIDE = 1_000_000


def print_table(table: Table) -> None:
    """Prints it; nothing is cut or broken where no terminal shows it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print(table, soft_wrap=console.is_terminal, markup=False)
