"""``c2f index``: encode a gallery once, to search it many times."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Encode a gallery once, to search it many times; bring its index up to date."
EXAMPLES = """\
  c2f index --workdir=runs/scenes --gallery=path/to/images --output=images.index
  c2f search --workdir=runs/scenes --index=images.index --audio question.wav

Repeat the first command after files were added, changed or removed, or if it was stopped: what
has not changed is not decoded again."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f index``."""
    arguments.add_run(parser)
    arguments.add_gallery(parser)
    parser.add_argument(
        "--kind",
        choices=("image", "speech"),
        default="image",
        help="what to index (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, help="folder of the index, local or gs://")
    parser.add_argument(
        "--store",
        choices=("folder", "lance"),
        help="what stores the rows: files of the folder, or a table of LanceDB (default: what the "
        "index has; folder for one that is made)",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="prepare approximate search of millions of items; needs --store=lance",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the whole index at the end, byte by byte"
    )
    arguments.add_distributed(parser)


def run(args: Namespace) -> int:
    """Encode the gallery into the index."""
    arguments.join_processes(args)

    from c2f_jax.index import build_index
    from c2f_jax.inference import TrainedModel
    from c2f_jax.training.distributed import in_every_process, in_first_process

    model = in_every_process(lambda: TrainedModel.load(args.workdir, args.step))
    index = build_index(
        model,
        args.output,
        args.gallery,
        kind=args.kind,
        split=args.split,
        store=args.store,
        approximate=args.approximate,
        progress=True,
    )
    if args.verify:
        in_first_process(index.verify)
    return 0
