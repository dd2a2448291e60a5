"""``c2f search``: find images by voice, or recordings by an image."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Find images by voice, or recordings by an image."
EXAMPLES = """\
  c2f search --workdir=runs/scenes --say "a small red circle" "a big yellow star"
  c2f search --workdir=runs/scenes --gallery=path/to/images --audio question.wav
  c2f search --workdir=runs/scenes --image photo.jpg"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f search``."""
    arguments.add_run(parser)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument(
        "--audio", nargs="+", metavar="FILE", help="recordings that describe the images to find"
    )
    query.add_argument(
        "--say", nargs="+", metavar="TEXT", help="sentences, which espeak-ng speaks as recordings"
    )
    query.add_argument(
        "--image", nargs="+", metavar="FILE", help="images whose spoken descriptions to find"
    )
    arguments.add_gallery(parser)
    parser.add_argument("--index", help="file written by `c2f index`, instead of --gallery")
    parser.add_argument(
        "--top", type=int, default=5, help="answers to show for each query (default: %(default)s)"
    )
    parser.add_argument(
        "--k", type=int, help="candidates that SIM reranks (default: the run's eval.k)"
    )
    parser.add_argument(
        "--output",
        help="page of answers (.html), with a .png beside it (default: <workdir>/search.html)",
    )


def run(args: Namespace) -> int:
    """Search, print the answers and write the page."""
    from c2f_jax.inference import TrainedModel
    from c2f_jax.search import Query, search

    query = Query(
        audio=args.audio or (),
        say=args.say or (),
        images=args.image or (),
        gallery=args.gallery,
        split=args.split,
        index=args.index,
        k=args.k,
        top=args.top,
        output=args.output,
    )
    page = search(TrainedModel.load(args.workdir, args.step), query)
    print(f"\nanswers: {page}")
    return 0
