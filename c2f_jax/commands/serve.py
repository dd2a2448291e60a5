"""``c2f serve``: a page that finds images by voice."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Serve a page and a JSON API that find images by voice."
EXAMPLES = """\
  c2f serve --workdir=runs/scenes --gallery=path/to/images
  c2f serve --workdir=runs/scenes --index=images.index --speech-index=recordings.index
  curl --data-binary @question.wav http://localhost:8000/api/search?top=3"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f serve``."""
    arguments.add_run(parser)
    arguments.add_gallery(parser)
    parser.add_argument("--index", help="folder written by `c2f index`, instead of --gallery")
    parser.add_argument(
        "--speech-index", help="index of recordings, to find those of an image as well"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")


def run(args: Namespace) -> int:
    """Load model and indexes, and serve until interrupted."""
    import fastapi  # noqa: F401  its absence is reported before the model is loaded

    from c2f_jax.errors import UserError
    from c2f_jax.inference import TrainedModel
    from c2f_jax.retriever import Retriever
    from c2f_jax.serving.server import serve

    if args.index and (args.gallery or args.split):
        raise UserError("--index replaces the gallery: leave out --gallery and --split")
    model = TrainedModel.load(args.workdir, args.step)
    first = Retriever(model)
    if args.index:
        first.open(args.index)
    else:
        first.index(args.gallery, split=args.split)
    assert first.gallery is not None
    retrievers = {first.gallery.about.kind: first}
    if args.speech_index:
        second = Retriever(model)
        kind = second.open(args.speech_index).about.kind
        if kind != "speech" or kind in retrievers:
            raise UserError(
                f"--speech-index={args.speech_index}: must be an index of recordings beside one of "
                "images: make it with `c2f index --kind=speech`"
            )
        retrievers[kind] = second
    serve(retrievers, args.host, args.port)
    return 0
