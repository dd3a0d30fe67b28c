"""How a program here starts: a dataclass of settings is its command line, a mistake one line."""

import argparse
import dataclasses
import math
import operator
import os
import re
import sys

RANGES = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "high": (operator.le, "at most"),
    "choices": (lambda value, choices: value in choices, "one of"),
}


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line, exit code 2, no traceback."""


def option(default, doc, **extra):
    """A dataclass field with its doc and its `choices`, `low`, `above` or `high`."""
    return dataclasses.field(default=default, metadata={"doc": doc, **extra})


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not a page of usage."""

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def command_line(settings_class, argv=None, prog=None, base=None):
    """Fill a dataclass of `option` fields from flags: `turn_tokens: int` is `--turn-tokens N`.

    base: a function of the flags that were given (a dict), which returns settings to use in place
    of the defaults. Raises UserError for an unknown flag and for a bad value.
    """
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s [--flag X ...]",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(settings_class)
    groups = groups_of(parser, settings_class)
    for field in fields:
        choices = field.metadata.get("choices")
        how = {"type": field.type, "choices": choices, "metavar": None if choices else "X"}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        default = "" if field.default == "" else f" [{field.default}]"
        doc = f"{field.metadata['doc']}{default}".replace("%", "%%")
        group = groups[field.name]
        group.add_argument(flag(field), default=argparse.SUPPRESS, help=doc, **how)
    given = vars(parser.parse_args(argv))
    settings = settings_class(**{**(base(given) if base else {}), **given})
    check_values(settings_class, vars(settings))
    return settings


def groups_of(parser, settings_class):
    """{field: group of --help}: a class's fields stand under its docstring, its bases' below."""
    groups = {}
    for owner in settings_class.__mro__:
        if dataclasses.is_dataclass(owner):
            group = parser.add_argument_group(owner.__doc__.splitlines()[0].rstrip("."))
            for name in owner.__annotations__:
                groups.setdefault(name, group)
    return groups


def flag(field):
    """The flag of a field."""
    return "--" + field.name.replace("_", "-")


def check_values(settings_class, values, where=""):
    """Raise UserError, which begins with `where`, for a {field: value} that no flag could have."""
    for field in dataclasses.fields(settings_class):
        value = values.get(field.name, field.default)
        if fault := fault_of(field, value):
            raise UserError(f"{where}{flag(field)} {str(value)[:200]}: must be {fault}")


def fault_of(field, value):
    """What the value of a field must be, where it is not; else ""."""
    if type(value) is not field.type and (field.type, type(value)) != (float, int):
        return f"of type {field.type.__name__}"
    if field.type is str and re.search("[\ud800-\udfff]", value):
        return "UTF-8 text"  # half a character, or a file name that is none
    if field.type is float and not abs(value) < math.inf:
        return "a finite number"
    for key, (holds, words) in RANGES.items():
        if key in field.metadata and not holds(value, field.metadata[key]):
            return f"{words} {field.metadata[key]}"
    return ""


def env_number(name, default, low=0, high=10**6):
    """An environment variable of torchrun's, an int. Raises UserError where it is none."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
        raise UserError(f"{name}={text}: must be a whole number from {low} to {high}; unset it")
    return int(text)


def flush_output():
    """Print what is still buffered. Raises UserError where nobody takes it."""
    try:
        print(end="", flush=True)
    except OSError as error:
        # or Python tries again as it ends, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"what is printed cannot be written ({error.strerror})") from error


def run_cli(main):
    """Call `main()` as a program: UserError is one line and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what cannot be read or printed ends no run
    try:
        try:
            code = main()
        except BrokenPipeError as error:  # unbuffered, nothing would be left to flush
            raise UserError(f"what is printed cannot be written ({error.strerror})") from error
        finally:
            flush_output()
        sys.exit(code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
