"""The ``c2f`` command line: find the command, run it, turn its outcome into an exit status."""

import hashlib
import importlib.util
import io
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from c2f_jax.commands.parser import create_parser
from c2f_jax.data.files import printable
from c2f_jax.errors import UserError, missing_extra

CACHE_BYTES = 2 * 2**30


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files hold any characters
    _quiet_libraries()
    _keep_compiled_programs()
    try:
        return args.run(args)
    except UserError as error:
        text = "\n".join(map(printable, str(error).split("\n")))  # names hold any characters
        print(f"{args.parser.prog}: {text}", file=sys.stderr)
        return 2
    except ImportError as error:
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
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # warns of each shape it does not need


def _keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, where the next command finds them.

    JAX's own variables have priority; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if importlib.util.find_spec("filelock") is None:  # JAX needs it to bound the folder's size
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "c2f_jax", f"compiled-{_processor()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # JAX would warn of each program
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
    # JAX leaves out what it compiles in less than a second, of which a search has several.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """Return a name of the kind of processor: programs of another may hold unknown instructions."""
    text = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        text += platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(main())
