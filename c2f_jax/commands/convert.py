"""``c2f convert``: make published weights readable by this package."""

from argparse import ArgumentParser, Namespace

SUMMARY = "Convert published weights for model.speech.weights or model.image.weights."
EXAMPLES = """\
  c2f convert path/to/whisper-tiny.en --output=weights/whisper_tiny_en
  c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base
  c2f convert ALBEF.pth --output=weights/albef
  c2f convert speechclip.ckpt --part=image --output=weights/speechclip_image"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f convert``."""
    parser.add_argument(
        "source", nargs="+", help="published files or folders, or a hub id such as owner/name"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--part",
        choices=("speech", "image"),
        help="which network of a checkpoint of SpeechCLIP: HuBERT or CLIP",
    )
    parser.add_argument(
        "--normalize",
        choices=("true", "false"),
        help="whether waveforms are scaled to mean 0 and variance 1, if the files do not say",
    )
    parser.add_argument("--license", help="license for the card, if no README names it")


def run(args: Namespace) -> int:
    """Convert the weights and print what they are."""
    from c2f_jax.pretrained.weights import convert

    normalize = None if args.normalize is None else args.normalize == "true"
    card = convert(
        args.source, args.output, part=args.part, normalize=normalize, license=args.license
    )
    print(
        f"{card['layout']}: {card['parameters']:,} parameters, "
        f"license {card['license']}: {args.output}"
    )
    if card["left_out"]:
        counts = ", ".join(f"{module} {count}" for module, count in card["left_out"].items())
        print(f"left out (tensors): {counts}")
    return 0
