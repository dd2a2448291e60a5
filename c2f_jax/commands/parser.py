"""The parser of the ``c2f`` command line."""

import argparse

from c2f_jax import __version__
from c2f_jax.commands import (
    ablate,
    compile,
    convert,
    data_check,
    data_prepare,
    evaluate,
    export,
    features,
    index,
    search,
    serve,
    train,
)

DESCRIPTION = """\
Speech-image retrieval, coarse to fine: train on spoken captions and images, search by voice.
"""
EXAMPLES = """\
from data to images found by voice:
  c2f train --config=spoken_scenes --workdir=runs/scenes
  c2f evaluate --workdir=runs/scenes --split=validation
  c2f search --workdir=runs/scenes --say "a small red circle above a large blue square"
c2f COMMAND --help explains each command.
"""
COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "index": index,
    "search": search,
    "export": export,
    "serve": serve,
    "compile": compile,
    "ablate": ablate,
    "convert": convert,
    "features": features,
    "data check": data_check,
    "data prepare": data_prepare,
}
GROUPS = {"data": "Check or prepare a data set."}


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it parses has ``run`` and ``parser`` set."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "c2f", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=as_written
    )
    parser.add_argument("--version", action="version", version=f"c2f_jax {__version__}")
    top = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = {"": top}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            parent = top.add_parser(group, help=GROUPS[group])
            groups[group] = parent.add_subparsers(required=True, metavar="COMMAND")
        epilog = f"examples:\n{command.EXAMPLES}"
        sub = groups[group].add_parser(
            word,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=epilog,
            formatter_class=as_written,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, parser=sub)
    return parser
