"""``c2f evaluate``: measure retrieval with a trained model, or with embeddings from files."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from c2f_jax.commands import arguments
from c2f_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from c2f_jax.config.experiment import Experiment
    from c2f_jax.data.source import PairSource
    from c2f_jax.retrieval.protocols import Protocol

SUMMARY = "Measure coarse and fine retrieval on a split, with confidence intervals."
EXAMPLES = """\
  c2f evaluate --workdir=runs/scenes --split=validation --k=64
  c2f evaluate --workdir=runs/scenes --data=path/to/manifest.jsonl
  c2f evaluate --baseline speech.npy image.npy --protocol=flickr8k_1k
Writes <workdir>/eval/<data set>-<split>.json, .html and .png; of a baseline .json and .html."""

# What only a run has.
OF_A_RUN = (
    *("workdir", "by_voice", "k", "score"),
    *("distributed", "coordinator", "num_processes", "process_id"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f evaluate``."""
    arguments.add_run(parser, required=False)
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
    group = parser.add_argument_group(
        "a baseline",
        "Embeddings that any other model made, in place of a run: (rows, D) arrays, one row for "
        "each recording and each image of the split, in its order. --data or --protocol names the "
        "data set (split: test), or two files of ids say which rows belong together.",
    )
    group.add_argument("--baseline", nargs=2, metavar=("SPEECH.npy", "IMAGE.npy"))
    group.add_argument(
        "--speech-ids", metavar="FILE", help="image of each recording: .npy, or text, one id a line"
    )
    group.add_argument("--image-ids", metavar="FILE", help="id of each image, in the same form")
    group.add_argument(
        "--output", metavar="PAGE.html", help="page to write (default: beside SPEECH.npy)"
    )


def run(args: Namespace) -> int:
    """Evaluate the run's checkpoint, or a baseline, as the arguments say and print the table."""
    if args.baseline is not None:
        return evaluate_baseline(args)
    if args.workdir is None:
        raise UserError(
            "give --workdir=RUN to evaluate a run, or --baseline SPEECH.npy IMAGE.npy for "
            "embeddings of another model"
        )
    for name in ("speech_ids", "image_ids", "output"):
        if getattr(args, name) is not None:
            raise UserError(f"{_flag(name)} goes with --baseline: leave it out")
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


def evaluate_baseline(args: Namespace) -> int:
    """Evaluate embeddings from files, print the table, write the page.

    Raises:
      UserError: the arguments do not go together, or the files cannot be used.
    """
    _check_baseline(args)
    from pathlib import PurePath

    from c2f_jax import evaluate
    from c2f_jax.datasets.registry import load_pairs
    from c2f_jax.retrieval.baseline import read_ids
    from c2f_jax.retrieval.protocols import find_protocol, open_protocol

    protocol = None if args.protocol is None else find_protocol(args.protocol)
    pairs: PairSource | tuple[np.ndarray, np.ndarray]
    if args.speech_ids is not None:
        pairs, label = (read_ids(args.speech_ids), read_ids(args.image_ids)), "ids"
    else:
        if protocol is None:
            pairs = load_pairs(args.data, args.split or "test")
        else:
            pairs = open_protocol(protocol, load_pairs, args.data, args.split)
        label = f"{evaluate.data_set_label(pairs)}-{pairs.split}"
    if protocol is not None:
        label += f"-{protocol.name}"

    speech, image = args.baseline
    page = args.output
    if page is None:
        file = PurePath(speech)
        page = f"{str(speech).removesuffix(file.suffix)}-{label}.html"
    result = evaluate.evaluate_baseline(speech, image, pairs, protocol=protocol, output=page)
    print(result.table())
    print(f"\nresults page: {page}")
    return 0


def _check_baseline(args: Namespace) -> None:
    """Raise UserError unless the arguments of a baseline go together."""
    values = {name: getattr(args, name) for name in OF_A_RUN}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if args.step != "best":
        given.append("step")
    if given:
        raise UserError(
            f"{_flag(given[0])} is for a run, and --baseline evaluates files in place of one: "
            "leave one of the two out"
        )
    ids = [name for name in ("speech_ids", "image_ids") if getattr(args, name) is not None]
    if len(ids) == 1:
        raise UserError(f"{_flag(ids[0])} alone: give both --speech-ids and --image-ids")
    if ids and (args.data or args.split):
        raise UserError(
            "--speech-ids and --image-ids take the place of a data set: leave out --data and "
            "--split"
        )
    if not ids and not args.data and not args.protocol:
        raise UserError(
            "--baseline needs to know which recording belongs to which image: name the data set by "
            "--data or --protocol, or give --speech-ids and --image-ids"
        )
    if args.output is not None and not args.output.endswith(".html"):
        raise UserError(f"--output={args.output}: must be a file that ends in .html")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
