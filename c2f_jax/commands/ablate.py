"""``c2f ablate``: add the ideas of the paper one by one and compare."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Test the claims of the paper: add its ideas one by one, with several seeds."
EXAMPLES = """\
  c2f ablate --config=spoken_scenes:simple --workdir=runs/ablation
  c2f ablate --config=spoken_scenes:simple --workdir=runs/sim --rows "+ SIM"
Writes <workdir>/table.md and table.json."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f ablate``."""
    arguments.add_config(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        type=arguments.directory,
        help="directory for the runs and the table; finished runs are reused",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds per row (default: %(default)s)")
    parser.add_argument(
        "--noise",
        type=arguments.number,
        default=0.3,
        help="share of shuffled captions in the noisy rows (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="rows to run, named as in the table (default: all)"
    )


def run(args: Namespace) -> int:
    """Train and evaluate each row with each seed and print the tables."""
    from c2f_jax.ablate import ablate
    from c2f_jax.config.files import load_config

    config = load_config(args.config, args.overrides)
    print(ablate(config, args.workdir, seeds=args.seeds, noise=args.noise, rows=args.rows))
    return 0
