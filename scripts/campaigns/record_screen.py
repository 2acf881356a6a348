"""Records what a command shows, with the time of each piece, and says the longest silence.

    python scripts/campaigns/record_screen.py --columns 60 build.cast nf4 build sample

The recording is an asciinema file, version 2: a header, then one JSON array a line. `--plain` runs
the command without a terminal. Silence counts from the start of the command to its end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.recorded_screen import record

_SHOWN: Final = 5  # of the silences


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--columns", default=80, show_default=True, help="Of the terminal.")
@click.option("--plain", is_flag=True, help="No terminal: a pipe.")
@click.argument("cast", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(columns: int, plain: bool, cast: Path, command: tuple[str, ...]) -> None:
    """Record COMMAND into the file CAST."""
    recording = record(list(command), columns, plain=plain)
    cast.write_text(recording.cast(), "utf-8")
    where = "without a terminal" if plain else f"at {columns} columns"
    click.echo(f"{where}: {recording.seconds:.1f} s, status {recording.status}, {cast}")
    for gap, begin in recording.gaps()[:_SHOWN]:
        click.echo(f"  silent for {gap:5.2f} s from {begin:6.2f} s on")
    sys.exit(recording.status)


if __name__ == "__main__":
    main()
