"""Arguments that several commands share."""

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace

DATA_SETS_HELP = (
    "flickr8k_audio, spoken_coco, places_audio, spoken_scenes, or a manifest (.jsonl, .csv)"
)
CONFIGS_HELP = (
    "spoken_scenes, manifest:FILE, flickr8k_audio, flickr8k_tts:FOLDER, places_audio, spoken_coco"
)
BY_VOICE_HELP = "report voices that were heard in training and other voices separately"


def directory(text: str) -> str:
    """Return a path as given, but refuse an empty one.

    An unset shell variable in ``--workdir=$RUN`` would otherwise mean the current directory.

    Raises:
      ArgumentTypeError: if the path is empty.
    """
    if not text:
        raise ArgumentTypeError("the directory is empty: give a path")
    return text


def number(text: str) -> float:
    """Return a finite number: NaN would switch off what it is compared with.

    Raises:
      ArgumentTypeError: if it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def add_run(parser: ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments that name a trained model: ``--workdir`` and ``--step``."""
    parser.add_argument(
        "--workdir", required=required, type=directory, help="directory of a training run"
    )
    parser.add_argument(
        "--step",
        default="best",
        help="checkpoint to use: best, latest or a step number (default: %(default)s)",
    )


def add_config(parser: ArgumentParser) -> None:
    """Add ``--config``; ``main`` collects the ``--config.KEY=VALUE`` overrides beside it."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="CONFIG[:ARG]",
        help=f"{CONFIGS_HELP}, or a file of your own (.py); change any option with "
        "--config.KEY=VALUE, for example --config.optimizer.learning_rate=3e-4",
    )


def add_gallery(parser: ArgumentParser) -> None:
    """Add the arguments that say what to search: ``--gallery`` and ``--split``."""
    parser.add_argument(
        "--gallery",
        help="folder of files, data set name or manifest (default: the data set of the run)",
    )
    parser.add_argument(
        "--split", help="split of the data set or manifest (default: the run's test split)"
    )


def add_data(parser: ArgumentParser) -> None:
    """Add the arguments that say where a data set is and how to read it."""
    parser.add_argument("data", help=DATA_SETS_HELP)
    parser.add_argument(
        "--manual-dir", help="folder with the downloaded files of a published data set"
    )
    parser.add_argument(
        "--data-dir",
        help="directory of prepared data sets (default: that of TFDS)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads that decode files (default: one per core)"
    )


def add_distributed(parser: ArgumentParser) -> None:
    """Add the arguments by which several processes find each other."""
    group = parser.add_argument_group(
        "several processes",
        "They divide the work; the first prints and writes. On a TPU pod or under Slurm, "
        "--distributed is enough. Elsewhere give the other three.",
    )
    group.add_argument(
        "--distributed", action="store_true", help="find the other processes from the environment"
    )
    group.add_argument("--coordinator", help="host:port of process 0")
    group.add_argument("--num-processes", type=int, help="number of processes")
    group.add_argument("--process-id", type=int, help="number of this process, from 0")


def join_processes(args: Namespace) -> bool:
    """Connect to the other processes, if the arguments ask for it.

    Returns:
      Whether this is one process of several.
    """
    given = (args.coordinator, args.num_processes, args.process_id)
    several = args.distributed or any(value is not None for value in given)
    if several:
        from c2f_jax.training.distributed import initialize

        initialize(*given)
    return several
