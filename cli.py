"""How every program here starts: one dataclass of settings is its command line, and a mistake is one line."""

import argparse
import dataclasses
import math
import sys


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, exit code 2, no traceback."""


def option(default, doc, **extra):
    """A dataclass field that carries its line of doc (and `choices`, `low`, `above`, `high`) for the command line."""
    return dataclasses.field(default=default, metadata={"doc": doc, **extra})


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not a page of usage."""

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def command_line(settings_class, argv=None, prog=None, base=None):
    """Fill a dataclass of `option` fields from the command line: `turn_tokens: int` becomes `--turn-tokens N`.

    base: a function of the flags that were given (a dict), which returns settings to use in place of the defaults.
    Raises UserError for an unknown flag and for a value that cannot be read or is out of its range.
    """
    parser = OneLineParser(
        prog=prog, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    for f in dataclasses.fields(settings_class):
        flag, doc = "--" + f.name.replace("_", "-"), f.metadata["doc"]
        common = dict(default=argparse.SUPPRESS, help=f"{doc} [{f.default}]".replace("%", "%%"))
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(
                flag,
                type=f.type,
                choices=f.metadata.get("choices"),
                metavar=None if f.metadata.get("choices") else "X",
                **common,
            )
    given = vars(parser.parse_args(argv))
    settings = settings_class(**{**(base(given) if base else {}), **given})
    for f in dataclasses.fields(settings):
        value, flag = getattr(settings, f.name), "--" + f.name.replace("_", "-")
        if f.type is float and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
        for key, wrong, word in (
            ("low", lambda v, m: not v >= m, "at least"),
            ("above", lambda v, m: not v > m, "above"),
            ("high", lambda v, m: not v <= m, "at most"),
        ):
            if key in f.metadata and wrong(value, f.metadata[key]):
                raise UserError(f"{flag} {value}: must be {word} {f.metadata[key]}")
    return settings


def run_cli(main):
    """Call `main()` as a program: UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
