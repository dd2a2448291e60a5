"""``c2f features``: run a frozen network once over a data set and keep its tokens."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from c2f_jax.commands import arguments

if TYPE_CHECKING:
    from c2f_jax.data.source import PairSource

SUMMARY = "Run a frozen published network once over a data set and keep its tokens."
EXAMPLES = """\
  c2f features --weights=weights/hubert_base --data=path/to/manifest.jsonl --output=features/hubert
  c2f train --config=... --workdir=... --config.data.speech_features=features/hubert"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f features``."""
    parser.add_argument(
        "--weights", required=True, help="folder written by `c2f convert`, or published files"
    )
    parser.add_argument("--data", required=True, help="data set name or manifest")
    parser.add_argument("--data-dir", help="directory of prepared data sets")
    parser.add_argument(
        "--splits",
        default="train,validation,test",
        help="splits, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--output", required=True, help="folder of the cache; an unfinished cache is resumed"
    )
    parser.add_argument(
        "--layer",
        default="last",
        help="last, the number of a hidden state, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=arguments.number,
        default=30.0,
        help="cut recordings to this length (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="items per batch (default: %(default)s)"
    )
    arguments.add_distributed(parser)


def run(args: Namespace) -> int:
    """Write the cache and name the items that could not be read."""
    arguments.join_processes(args)

    from c2f_jax.datasets.registry import load_pairs, make_data_set
    from c2f_jax.pretrained.extract_features import FeatureOptions, extract_features
    from c2f_jax.training.distributed import first_process_first, in_every_process, say

    def open_splits() -> list[PairSource]:
        first_process_first(lambda: make_data_set(args.data, args.data_dir))
        return [load_pairs(args.data, split, args.data_dir) for split in args.splits.split(",")]

    sources = in_every_process(open_splits)
    cache = extract_features(
        args.weights,
        sources,
        args.output,
        FeatureOptions(args.layer, args.max_seconds),
        args.batch_size,
    )
    for source in sources:
        for name, reason in source.bad_items.reasons.items():
            say(f"left out: {name}: {reason}")
    say(f"features of {len(cache)} items: {args.output}")
    return 0
