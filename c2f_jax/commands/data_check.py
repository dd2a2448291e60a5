"""``c2f data check``: decode every item of a data set and report what is wrong."""

import json
from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Decode every item of a data set and report what is wrong."
EXAMPLES = """\
  c2f data check path/to/manifest.jsonl --output=check --fix=clean.jsonl
  c2f data check flickr8k_audio --manual-dir=downloads
  c2f data check path/to/other.jsonl --workdir=runs/mine
Exit status: 0 passed, 1 warnings, 3 errors."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f data check``."""
    arguments.add_data(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="write check.json and check.html, with players, to DIR"
    )
    parser.add_argument(
        "--fix", metavar="FILE", help="write a manifest (.jsonl) of the items that can be used"
    )
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument(
        "--max-seconds",
        type=arguments.number,
        default=30.0,
        help="report recordings longer than this (default: %(default)s)",
    )
    limits.add_argument(
        "--workdir",
        type=arguments.directory,
        help="directory of a training run: report what that run would leave out, cut or enlarge",
    )


def run(args: Namespace) -> int:
    """Check the data set, print the report and write what was asked for."""
    from c2f_jax.data.files import check_writable
    from c2f_jax.data_check.check import RunLimits, check_data
    from c2f_jax.data_check.clean_manifest import (
        check_name,
        count_dropped,
        joined_ids,
        write_clean_manifest,
    )
    from c2f_jax.data_check.findings import EXIT_CODES
    from c2f_jax.galleries.media import shortlist

    # Before hours of decoding.
    if args.output:
        check_writable(args.output, "--output", folder=True)
    if args.fix:
        check_name(args.fix, args.data)
    limits = {"max_seconds": args.max_seconds}
    if args.workdir:
        from c2f_jax.config.experiment import create_experiment
        from c2f_jax.config.files import load_saved_config

        experiment = create_experiment(load_saved_config(args.workdir))
        data = experiment.data_of(args.data)
        limits = {"run": RunLimits(data, experiment.batch_size)}
    report = check_data(
        args.data,
        manual_dir=args.manual_dir,
        data_dir=args.data_dir,
        **limits,
        threads=args.threads,
    )
    print(report.text())

    if args.output:
        from etils import epath

        from c2f_jax.data_check.page import write_check_page

        folder = epath.Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(json.dumps(report.json(), indent=2) + "\n")
        write_check_page(folder / "check.html", report)
        print(f"report: {folder / 'check.html'}, {folder / 'check.json'}")
    if args.fix:
        written = write_clean_manifest(report, args.fix)
        print(f"{written:,} pairs written: {args.fix}")
        for what, count in count_dropped(report, written).items():
            print(f"  left out: {count:,} {what}")
        for split in report.sources:
            joined = joined_ids(report, split).items()
            if joined:
                names = shortlist(f"{gone!r} with {kept!r}" for gone, kept in joined)
                print(f"  image_ids of {split} joined, since images are the same: {names}")
    return EXIT_CODES[report.severity]
