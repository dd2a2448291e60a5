"""The ``c2f`` command line: find the command, run it, turn its outcome into an exit status."""

import logging
import os
import sys
from collections.abc import Sequence

from c2f_jax.commands.parser import create_parser
from c2f_jax.errors import UserError, missing_extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: words after ``c2f``; None for those of this process.

    Returns:
      The exit status: 0 done, 2 a mistake that the user can fix, 42 stopped and can be resumed, 130
      interrupted; ``c2f data check`` also returns 1 for warnings and 3 for errors in the data.
    """
    args, rest = create_parser().parse_known_args(argv)
    args.overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if word not in args.overrides or "config" not in args]
    if unknown:
        args.parser.error(f"unknown argument {unknown[0]}; see {args.parser.prog} --help")
    _quiet_libraries()
    try:
        return args.run(args)
    except UserError as error:
        print(f"{args.parser.prog}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        line = missing_extra(args.parser.prog, error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: interrupted", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """Silence what jax, TensorFlow and Orbax print on import; their errors still show."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow prints a notice about it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of read-only directories


if __name__ == "__main__":
    sys.exit(main())
