"""What the commands that write parts of docs/kernels*.md share: their options, and where their figures go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyfast.bench.readme import replace_block


def publish(block: str, description: str, measure: Callable[[], dict[str, Any]], text: Callable[[dict], str]) -> None:
    """The command line of such a command.

    Figures are made by ``measure``, or read from a JSON file with ``--from``, printed as Markdown by ``text``, and
    written where the options say. ``block`` is the name of the part of the page.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--write", type=Path, help=f"a Markdown file with a block named {block} to make anew")
    parser.add_argument("--from", dest="source", type=Path, help="take the figures from this JSON, measure nothing")
    arguments = parser.parse_args()
    figures = json.loads(arguments.source.read_text()) if arguments.source else measure()
    written = text(figures)
    print(written)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.write:
        arguments.write.write_text(replace_block(arguments.write.read_text(), block, written))


def measure_or_tables(
    description: str,
    measure: Callable[[argparse.Namespace], None],
    tables: Callable[[list[dict]], dict[str, str]],
    **option: Any,
) -> None:
    """The command line of one that measures on a GPU, and makes tables of the files of several.

    ``measure FILE`` calls ``measure`` with the arguments; ``tables FILES`` prints the Markdown by block that ``tables``
    gives, and writes it where ``--write`` says. ``option``: one more, its name under ``name``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("files", type=Path, nargs="+", help="JSON: the one to write, or those to make tables of")
    parser.add_argument("--write", type=Path, help="a Markdown file whose blocks are made anew")
    parser.add_argument(option.pop("name"), **option)
    arguments = parser.parse_args()
    if arguments.what == "measure":
        measure(arguments)
        return
    for block, text in tables([json.loads(path.read_text()) for path in arguments.files]).items():
        print(text, end="\n\n")
        if arguments.write:
            arguments.write.write_text(replace_block(arguments.write.read_text(), block, text))
