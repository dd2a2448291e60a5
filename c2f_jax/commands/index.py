"""``c2f index``: encode a gallery once, to search it many times."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Encode a gallery once, to search it many times."
EXAMPLES = """\
  c2f index --workdir=runs/scenes --gallery=path/to/images --output=gallery.npz
  c2f search --workdir=runs/scenes --index=gallery.npz --audio question.wav"""


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
    parser.add_argument("--output", required=True, help="index file (.npz), local or gs://")
    arguments.add_distributed(parser)


def run(args: Namespace) -> int:
    """Encode the gallery and save the index."""
    arguments.join_processes(args)

    from c2f_jax.inference import TrainedModel
    from c2f_jax.search import build_index
    from c2f_jax.training.distributed import in_every_process, in_first_process, say

    model = in_every_process(lambda: TrainedModel.load(args.workdir, args.step))
    index = build_index(model, args.gallery, kind=args.kind, split=args.split)
    in_first_process(lambda: index.save(args.output))
    say(f"{len(index.names)} items indexed: {args.output}")
    return 0
