"""``c2f evaluate``: measure retrieval with a trained model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from c2f_jax.commands import arguments

if TYPE_CHECKING:
    from c2f_jax.config.experiment import Experiment
    from c2f_jax.data.source import PairSource
    from c2f_jax.retrieval.protocols import Protocol

SUMMARY = "Measure coarse and fine retrieval on a split, with confidence intervals."
EXAMPLES = """\
  c2f evaluate --workdir=runs/scenes --split=validation --k=64
  c2f evaluate --workdir=runs/scenes --data=path/to/manifest.jsonl
Writes <workdir>/eval/<data set>-<split>.json, .html and .png."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f evaluate``."""
    arguments.add_run(parser)
    parser.add_argument(
        "--data", help="another data set or manifest, zero-shot (default: that of the run)"
    )
    parser.add_argument(
        "--split", help="split (default: that of the protocol, else the run's test split)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--protocol",
        help="published protocol, with its data set: flickr8k_1k, spoken_coco_5k, "
        "spoken_coco_1k_5fold, places_1k or mteb",
    )
    how.add_argument("--by-voice", action="store_true", help=arguments.BY_VOICE_HELP)
    parser.add_argument(
        "--k", type=int, help="candidates that SIM reranks (default: the run's eval.k)"
    )
    parser.add_argument(
        "--score",
        help="score that orders the candidates: sic, sim, sum, prob or joint "
        "(default: the run's eval.score)",
    )
    arguments.add_distributed(parser)


def run(args: Namespace) -> int:
    """Evaluate the run's checkpoint as the arguments say and print the table."""
    arguments.join_processes(args)

    from c2f_jax.config.experiment import create_experiment
    from c2f_jax.config.files import load_saved_config
    from c2f_jax.training.distributed import in_every_process

    def load() -> Experiment:
        config = load_saved_config(args.workdir)
        if args.k is not None:
            config.eval.k = args.k
        if args.score is not None:
            config.eval.score = args.score
        return create_experiment(config)

    experiment = in_every_process(load)
    where = {"step": args.step, "target": args.data, "split": args.split}
    if args.by_voice:
        evaluate_by_voice(experiment, args.workdir, **where)
    else:
        evaluate_on(experiment, args.workdir, protocol=args.protocol, **where)
    return 0


def open_target(
    experiment: Experiment,
    target: str | None,
    split: str | None = None,
    protocol: str | None = None,
) -> tuple[PairSource, Protocol | None]:
    """Open what to evaluate on.

    Args:
      experiment: gives the data set, split and data directory that are not named.
      target: data set, manifest or protocol name; None for the run's own data set.
      split: split; None for the protocol's, else the run's test split.
      protocol: protocol name.

    Returns:
      The source of pairs, and the protocol if one was named.

    Raises:
      UserError: if the target, the split or the protocol does not exist.
    """
    from c2f_jax.retrieval.protocols import PROTOCOLS, find_protocol, open_protocol

    def load(name: str, split: str) -> PairSource:
        return experiment.data_of(name).load(split)

    if protocol is None and target in PROTOCOLS:
        protocol, target = target, None
    if protocol is None:
        return load(target or experiment.data.name, split or experiment.data.test_split), None
    found = find_protocol(protocol)
    return open_protocol(found, load, target, split), found


def _open_together(
    experiment: Experiment,
    target: str | None,
    split: str | None = None,
    protocol: str | None = None,
) -> tuple[PairSource, Protocol | None]:
    """Open a target (see ``open_target``) in every process; the first makes what is missing."""
    from c2f_jax.training.distributed import first_process_first, in_every_process

    def open_it() -> tuple[PairSource, Protocol | None]:
        return open_target(experiment, target, split, protocol)

    return in_every_process(lambda: first_process_first(open_it))


def evaluate_on(
    experiment: Experiment,
    workdir: str,
    *,
    step: str = "best",
    target: str | None = None,
    split: str | None = None,
    protocol: str | None = None,
) -> None:
    """Evaluate a checkpoint on a target (see ``open_target``), print the table, write the page."""
    from c2f_jax.evaluate import evaluate_source
    from c2f_jax.inference import TrainedModel
    from c2f_jax.training.distributed import in_every_process, say

    source, followed = _open_together(experiment, target, split, protocol)
    model = in_every_process(lambda: TrainedModel.load(workdir, step, experiment))
    result, page = evaluate_source(model, source, protocol=followed)
    say(result.table())
    say(f"\nresults page: {page}")


def evaluate_by_voice(
    experiment: Experiment,
    workdir: str,
    *,
    step: str = "best",
    target: str | None = None,
    split: str | None = None,
) -> None:
    """Evaluate the voices heard in training and the other voices separately, print both tables."""
    from c2f_jax import evaluate
    from c2f_jax.inference import TrainedModel
    from c2f_jax.training.distributed import in_every_process, say

    source, _ = _open_together(experiment, target, split)
    model = in_every_process(lambda: TrainedModel.load(workdir, step, experiment))
    for name, result in evaluate.evaluate_by_voice(model, source).items():
        say(f"voices {name} in training, {result.queries.gallery_recordings} recordings")
        say(result.table())
