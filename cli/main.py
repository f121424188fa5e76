"""`bcosify VERB ...`: parses, calls one function, prints. Text for people goes to stderr, `--json` results to stdout.

Exit codes: 0 done, 1 it failed (the message says what to do next), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from ..core.errors import BcosifyError, DataWarning, Incomplete, OptionError, near_miss
from ..core.files import json_text
from ..core.threads import share_cores
from ..core.words import printable

__all__ = ["VERBS", "main"]

# Verb -> what it does; the function is in the module of the same name, so `--help` need not import torch.
VERBS = {
    "convert": "turn a pretrained model into an interpretable student that starts equal to it",
    "align": "train a converted student towards its teacher on unlabelled pictures",
    "explain": "explain decisions on pictures exactly, with a ledger that adds up",
    "evaluate": "measure a student against its teacher and other methods, and write a report",
    "compare": "put several evaluations side by side",
    "publish": "put a converted model on the hub, with a card of what was measured",
    "export": "write a finished student as one ONNX or torch.export file",
    "inspect": "show what a model is, and what a conversion would do to it",
    "shards": "pack a folder of pictures into tar shards",
    "demo": "convert, align and explain a real model in a few minutes, and write a report",
}

NUMBERS = {int: "a whole number", float: "a number"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `bcosify` command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("bcosify"))
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"bcosify: no verb {verb!r}.{near_miss(verb, VERBS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    if not {"-h", "--help"} & {*rest}:
        share_cores()
    try:
        with _plain_warnings():
            return _call(verb, rest)
    except OptionError as error:
        wrong = "; ".join(f"--{name.replace('_', '-')} {fault}" for name, fault in error.wrong.items())
        print(f"bcosify {verb}: {wrong} (bcosify {verb} --help tells more)", file=sys.stderr)
        return 2
    except BcosifyError as error:
        print(f"bcosify {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"bcosify {verb}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, bcosify's own warnings are a line without the place in its code, and Pillow's of EXIF are none: they name
    no picture, and ours do."""
    written, ours = warnings.formatwarning, str(Path(__file__).resolve().parents[1])

    def plain(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        own = issubclass(category, DataWarning) or (category is UserWarning and filename.startswith(ours))
        return f"bcosify: {message}\n" if own else written(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(possibly )?corrupt EXIF")
            yield
    finally:
        warnings.formatwarning = written


def _call(verb: str, arguments: list[str]) -> int:
    function = getattr(importlib.import_module(f".{verb}", __package__), verb)
    parser = _parser(verb, function)
    try:
        options = vars(parser.parse_args(arguments))
    except argparse.ArgumentError as error:
        if wrong := _wrong_type(str(error), typing.get_type_hints(function)):
            raise OptionError(wrong) from None
        known = [option for action in parser._actions for option in action.option_strings]
        unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known]
        hint = near_miss(unknown[0].partition("=")[0], known) if unknown else ""
        print(
            f"bcosify {verb}: {printable(error)}.{hint}\n{parser.format_usage()}(bcosify {verb} --help tells more)",
            file=sys.stderr,
        )
        return 2
    failed: Incomplete | None = None
    try:
        result: Any = function(**{name: options[name] for name in inspect.signature(function).parameters})
    except Incomplete as error:
        result, failed = error.result, error
    if options["json"] and result is not None:
        print(json_text(result, indent=2, default=str))
    if failed is not None:
        raise failed
    return 0


def _wrong_type(message: str, hints: dict[str, Any]) -> dict[str, str]:
    """The option that is no number, and what is wrong with it, of what jsonargparse says in nine lines; empty for other
    messages."""
    found = re.match(r'Parser key "(\w+)":.*value: (.*?)\.?$', message, re.DOTALL)
    kinds = typing.get_args(hint) or (hint,) if found and (hint := hints.get(found[1])) else ()
    wanted = next((words for kind, words in NUMBERS.items() if kind in kinds), "")
    return {found[1]: f"must be {wanted}; got '{printable(found[2])}'"} if found and wanted else {}


def _parser(verb: str, function: Any) -> ArgumentParser:
    """Options from a function's signature and the Args of its docstring.

    Parameters without a default are positional, keyword-only ones a required option; a bool is --flag or --no-flag.
    """
    documented = docstring_parser.parse(function.__doc__ or "")
    help_of = {item.arg_name: _spelt_out(item.description or "") for item in documented.params}
    text = "\n\n".join(filter(None, (documented.short_description, documented.long_description)))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog=f"bcosify {verb}", description=text, formatter_class=formatter, exit_on_error=False)
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        hint, flag = hints[name], f"--{name.replace('_', '-')}"
        settings: dict[str, Any] = {"help": help_of[name]}
        if not required:
            settings["default"] = parameter.default
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            settings["required"] = True
        if hint is bool:
            # Only the spelling that changes the default is worth showing.
            no = f"--no-{name.replace('_', '-')}" if parameter.default else flag
            parser.add_argument(no, dest=name, action="store_false" if parameter.default else "store_true", **settings)
        else:
            positional = required and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            where = (name,) if positional else (flag,)
            item = _item_type(hint)
            several = {} if item is None else {"nargs": "+", **({} if positional else {"action": "extend"})}
            parser.add_argument(*where, type=item or hint, **several, **settings)
    return parser


def _spelt_out(text: str) -> str:
    """`text` with `{references}` and `{methods}` spelt out: how a model of each library is named, and the target
    families. Only then are libraries and methods imported."""
    if "{references}" in text:
        from ..convert.libraries import reference_forms

        text = text.replace("{references}", ", ".join(reference_forms()))
    if "{methods}" in text:
        from ..convert.methods import METHODS

        text = text.replace("{methods}", ", ".join(f"`{name}` ({method.hint})" for name, method in METHODS.items()))
    return text


def _item_type(hint: Any) -> Any:
    """`str` of `list[str] | None`, None for what is no list."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    lists = [option for option in options if typing.get_origin(option) is list]
    return typing.get_args(lists[0])[0] if lists else None


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: bcosify VERB ... (bcosify VERB --help tells more)",
            "",
            *lines,
            "",
            "A model is named LIBRARY:NAME, such as timm:resnet50 or hf:ORG/NAME (bcosify convert --help lists all",
            "libraries), or dir:PATH. A converted model is a folder, or ORG/REPO[@rev] on the hub.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
