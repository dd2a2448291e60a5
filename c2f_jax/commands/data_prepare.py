"""``c2f data prepare``: turn downloads or a manifest into a prepared data set."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Turn downloaded folders or a manifest into a prepared data set."
EXAMPLES = """\
  c2f data prepare flickr8k_audio --dry-run
  c2f data prepare flickr8k_audio --manual-dir=downloads
  c2f data prepare path/to/manifest.jsonl
To resume after an interruption, repeat the command."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f data prepare``."""
    arguments.add_data(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the missing files, their sizes and where to get them",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the missing files that have a direct link"
    )
    parser.add_argument(
        "--name", help="name for the prepared manifest (default: that of its folder)"
    )
    parser.add_argument(
        "--max-bad-share",
        type=arguments.number,
        default=0.01,
        help="stop if more than this share of the items is bad (default: %(default)s)",
    )


def run(args: Namespace) -> int:
    """Prepare the data set, or only say what is missing."""
    from c2f_jax.datasets.prepare import dry_run, left_out_text, prepare

    where = {"manual_dir": args.manual_dir, "data_dir": args.data_dir, "name": args.name}
    if args.dry_run:
        print(dry_run(args.data, **where))
        return 0
    ready = prepare(
        args.data,
        download=args.download,
        threads=args.threads,
        max_bad_share=args.max_bad_share,
        **where,
    )
    left_out = left_out_text(ready, args.data_dir)
    if left_out:
        print(left_out)
    print(f"prepared; use it with --config.data.name={ready}")
    return 0
