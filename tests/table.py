#!/usr/bin/env python3
"""Results that programs added to a file with --json, as tables for people.

    python tests/table.py FILE

One table for each kind of line ("what"); its columns are all that its lines have.
"""

import json
import sys
from pathlib import Path


def cell(value):
    """A value for people; None is what could not be measured."""
    if value is None:
        return "failed"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(what, rows):
    """The table of rows of one kind; what a row lacks is "-"."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "what"))
    lines = [columns]
    for row in rows:
        lines.append([cell(row[key]) if key in row else "-" for key in columns])
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[word.ljust(width) for word, width in zip(line, widths)] for line in lines]
    return "\n".join([f"== {what}", *("  ".join(line).rstrip() for line in padded)])


def tables(rows):
    """All tables, in the order in which their kinds first appear."""
    kinds = dict.fromkeys(row["what"] for row in rows)
    return "\n\n".join(table(kind, [row for row in rows if row["what"] == kind]) for kind in kinds)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print(tables([json.loads(line) for line in lines]))
