"""``c2f data check``: decode every item of a data set and report what is wrong."""

import json
from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Decode every item of a data set and report what is wrong."
EXAMPLES = """\
  c2f data check path/to/manifest.jsonl --output=check --fix=clean.jsonl
  c2f data check flickr8k_audio --manual-dir=downloads
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
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=30.0,
        help="report recordings longer than this (default: %(default)s)",
    )


def run(args: Namespace) -> int:
    """Check the data set, print the report and write what was asked for."""
    from c2f_jax.data_check.check import check_data
    from c2f_jax.data_check.clean_manifest import check_name, write_clean_manifest
    from c2f_jax.data_check.findings import EXIT_CODES

    if args.fix:
        check_name(args.fix)  # before hours of decoding
    report = check_data(
        args.data,
        manual_dir=args.manual_dir,
        data_dir=args.data_dir,
        max_seconds=args.max_seconds,
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
        print(f"{write_clean_manifest(report, args.fix):,} pairs written: {args.fix}")
    return EXIT_CODES[report.severity]
