"""``c2f export``: write a trained model as programs that run without this package's models."""

from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Write encoders and matcher as StableHLO for jax alone, or as ONNX."
EXAMPLES = """\
  c2f export --workdir=runs/scenes --output=exports/scenes
  c2f export --workdir=runs/scenes --output=exports/scenes_onnx --format=onnx
c2f_jax.exported.load(FOLDER) loads the first; ONNX needs the extra `onnx`, in an environment of its
own, since it brings an older Orbax."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f export``."""
    arguments.add_run(parser)
    parser.add_argument(
        "--output", required=True, type=arguments.directory, help="empty or new local folder"
    )
    parser.add_argument(
        "--format",
        choices=("stablehlo", "onnx"),
        default="stablehlo",
        help="what to write (default: %(default)s)",
    )


def run(args: Namespace) -> int:
    """Export the run's checkpoint and print what was written."""
    if args.format == "onnx":
        import jax2onnx  # noqa: F401  # before the run is loaded: it may be missing

    from c2f_jax.export import export_model, load_for_export

    model = load_for_export(args.workdir, args.step, args.format)
    header = export_model(model, args.output, args.format)
    for name, file in header["files"].items():
        print(f"{file['bytes']:>14,} bytes  {name}")
    if not model.has_sim:
        print(f"without match: SIM is not trained at step {model.step}")
    until = ""
    if "promised_until" in header:
        until = f"; jaxlibs built up to {header['promised_until']} are promised to read it"
    print(f"exported: {args.output}{until}")
    return 0
