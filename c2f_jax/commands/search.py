"""``c2f search``: find images by voice, or recordings by an image."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Find images by voice, or recordings by an image."
EXAMPLES = """\
  c2f search --workdir=runs/scenes --say "a small red circle" "a big yellow star"
  c2f search --workdir=runs/scenes --gallery=path/to/images --audio question.wav
  c2f search --workdir=runs/scenes --image photo.jpg
  c2f search --workdir=runs/scenes --gallery=photos --audio question.wav --where "date > '2025'"

The index of a gallery is kept in the workdir: the next search reads what has changed."""


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
    parser.add_argument("--index", help="folder written by `c2f index`, instead of --gallery")
    parser.add_argument(
        "--where",
        metavar="SQL",
        help="search only items that meet a condition on name, date, modified, size, width, "
        "height, seconds, caption or speaker",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="let the first stage miss some, to be faster in a gallery of millions; needs an index "
        "that was made with --approximate",
    )
    parser.add_argument(
        "--top", type=int, default=5, help="answers to show for each query (default: %(default)s)"
    )
    parser.add_argument(
        "--rerank",
        type=int,
        metavar="K",
        help="candidates that SIM reranks, 0 for none (default: the run's eval.k)",
    )
    parser.add_argument(
        "--min-probability",
        type=arguments.number,
        metavar="P",
        help="leave out answers that match with a smaller probability; there may be none",
    )
    parser.add_argument(
        "--output",
        help="page of answers (.html), with a .png beside it (default: <workdir>/search.html; "
        "with --json, none)",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each query")


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
        rerank=args.rerank,
        where=args.where,
        min_probability=args.min_probability,
        approximate=args.approximate,
        top=args.top,
        output=args.output,
        as_json=args.json,
    )
    page = search(TrainedModel.load(args.workdir, args.step), query)
    if page is not None and not args.json:
        print(f"answers: {page}")
    return 0
