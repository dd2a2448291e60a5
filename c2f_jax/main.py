"""The ``c2f`` command: train, evaluate, index, search, ablate, convert, features."""

import argparse
import difflib
import logging
import os
import sys

from c2f_jax.errors import UserError

EPILOG = """\
A run from data to pictures:
  c2f train --config=configs/spoken_scenes.py --workdir=runs/scenes
  c2f evaluate --workdir=runs/scenes --split=validation
  c2f search --workdir=runs/scenes --say "a small red circle above a large blue square"
"""


def main(argv=None):
    """Run the command line; returns the exit status (0 done, 2 a mistake that the user can mend, 42 preempted)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and not args.takes_config):
        args.parser.error(f"unknown argument {(unknown or overrides)[0]}; see c2f {args.command} --help")
    # jax and TensorFlow announce on import what hardware they did not find; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow greets with a notice about it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of each read-only directory that it opens
    try:
        return args.run(args, overrides) or 0
    except UserError as error:
        print(f"c2f {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"c2f {args.command}: interrupted", file=sys.stderr)
        return 130


def load_config(path, overrides=()):
    """A locked ConfigDict from ``file.py[:argument]`` with ``--config.key=value`` overrides applied.

    Raises:
      UserError: no such file, unknown key (with the nearest known one), value of another type.
    """
    file = path.partition(":")[0]
    if not os.path.isfile(file):
        raise UserError(f"--config={path}: there is no file {file}; the repository's are in configs/")
    known = _keys(_read_config(path, ()))
    for word in overrides:
        key = word.partition("=")[0].removeprefix("--config.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean --config.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"the configuration has no {key}: {hint}")
    return _read_config(path, overrides)


def _read_config(path, overrides):
    from absl import flags
    from ml_collections import config_flags

    values, argv = flags.FlagValues(), ["c2f", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--config={path}: {error}") from error


def _keys(config, prefix=""):
    keys = []
    for key, value in config.items():
        keys += _keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key]
    return keys


def _parser():
    parser = argparse.ArgumentParser(
        prog="c2f",
        description="Speech-image retrieval, coarse to fine: train on spoken captions and pictures, search by voice",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, summary, takes_config=False):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run, parser=sub, takes_config=takes_config)
        return sub

    train = add("train", _train, "Train, resume, evaluate the best checkpoint on the test split.", takes_config=True)
    train.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="configuration, such as configs/spoken_scenes.py; any value can be changed by --config.KEY=VALUE, "
        "for example --config.optimizer.learning_rate=3e-4",
    )
    train.add_argument("--workdir", required=True, help="directory of the run, local or gs://; an existing run goes on")
    _distributed_arguments(train)

    evaluate = add(
        "evaluate", _evaluate, "Coarse and fine retrieval on a split, with intervals, JSON and an HTML page."
    )
    evaluate.add_argument("--workdir", required=True, help="directory of a training run")
    evaluate.add_argument("--data", help="another data set or manifest (zero-shot); the run's own by default")
    evaluate.add_argument("--split", help="split; the run's test split by default")
    evaluate.add_argument(
        "--step", default="best", help="best, latest or the number of a checkpoint (default: %(default)s)"
    )
    evaluate.add_argument(
        "--by-voice", action="store_true", help="voices heard in training and others apart, on all pictures"
    )
    evaluate.add_argument("--k", type=int, help="candidates that SIM re-ranks; the run's value by default")
    evaluate.add_argument("--score", help="ranking of the fine stage: sic, sim, sum, prob or joint")

    index = add("index", _index, "Encode a gallery once, to be searched many times.")
    search = add("search", _search, "Search pictures by voice, or recordings by a picture.")
    for sub in (index, search):
        sub.add_argument("--workdir", required=True, help="directory of a training run")
        sub.add_argument(
            "--step", default="best", help="best, latest or the number of a checkpoint (default: %(default)s)"
        )
        sub.add_argument("--gallery", help="folder of files, data set name or manifest; the run's own data by default")
        sub.add_argument("--split", help="split of a data set or manifest; the run's test split by default")
    index.add_argument(
        "--kind", choices=("image", "speech"), default="image", help="what to index (default: %(default)s)"
    )
    index.add_argument("--output", required=True, help="index file to write (.npz), local or gs://")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--audio", nargs="+", metavar="FILE", help="recordings that describe pictures")
    query.add_argument("--say", nargs="+", metavar="TEXT", help="sentences, spoken by espeak-ng and used as recordings")
    query.add_argument("--image", nargs="+", metavar="FILE", help="pictures, to find recordings that describe them")
    search.add_argument("--index", help="a file of `c2f index`, in place of --gallery")
    search.add_argument("--top", type=int, default=5, help="answers shown for each query (default: %(default)s)")
    search.add_argument("--k", type=int, help="candidates that SIM re-ranks; the run's value by default")
    search.add_argument(
        "--output", help="page of the answers (.html); <workdir>/search.html by default, with a .png beside it"
    )

    ablate = add(
        "ablate", _ablate, "The paper's claims as an experiment: one row an idea, several seeds.", takes_config=True
    )
    ablate.add_argument("--config", required=True, metavar="FILE[:ARG]", help="configuration that the rows vary")
    ablate.add_argument(
        "--workdir", required=True, help="directory for all the runs and the table; finished runs are kept"
    )
    ablate.add_argument("--seeds", type=int, default=3, help="seeds of each row (default: %(default)s)")
    ablate.add_argument(
        "--noise", type=float, default=0.3, help="share of shuffled captions in the noisy rows (default: %(default)s)"
    )
    ablate.add_argument("--rows", help="comma-separated names, to run some of the rows only")
    convert = add(
        "convert", _convert, "Published weights to a folder that model.speech.weights or model.image.weights name."
    )
    convert.add_argument("source", nargs="+", help="files or folders as published, or a hub id owner/name")
    convert.add_argument("--output", required=True, help="folder to write")
    convert.add_argument(
        "--normalise",
        choices=("true", "false"),
        help="whether waveforms have mean 0 and variance 1, where the publisher's files do not say",
    )
    convert.add_argument("--licence", help="for the card, where no README says")

    features = add("features", _features, "Run a frozen published network once over a data set and keep its tokens.")
    features.add_argument("--weights", required=True, help="folder of c2f convert, or published files")
    features.add_argument("--data", required=True, help="data set name or manifest")
    features.add_argument("--data-dir", help="where prepared data sets are")
    features.add_argument("--splits", default="train,validation,test", help="comma-separated (default: %(default)s)")
    features.add_argument("--output", required=True, help="folder of the cache; an unfinished one is gone on with")
    features.add_argument(
        "--layer", default="last", help="last, the number of a hidden state, or all (default: %(default)s)"
    )
    features.add_argument(
        "--max-seconds", type=float, default=30.0, help="recordings are cut to this length (default: %(default)s)"
    )
    features.add_argument("--batch-size", type=int, default=16, help="items at once (default: %(default)s)")
    _distributed_arguments(features)
    return parser


def _distributed_arguments(parser):
    group = parser.add_argument_group(
        "several processes", "On a TPU pod or under Slurm --distributed alone finds its peers; elsewhere name them."
    )
    group.add_argument("--distributed", action="store_true", help="one process of several")
    group.add_argument("--coordinator", help="host:port of process 0")
    group.add_argument("--num-processes", type=int, help="number of processes")
    group.add_argument("--process-id", type=int, help="number of this process, from 0")


def _train(args, overrides):
    from c2f_jax.distributed import initialize

    config = load_config(args.config, overrides)
    if args.distributed or args.coordinator:
        initialize(args.coordinator, args.num_processes, args.process_id)
    from c2f_jax.retrieval.evaluation import format_table
    from c2f_jax.train import PREEMPTED_EXIT_CODE, Preempted, train_and_evaluate

    try:
        _, _, result, page = train_and_evaluate(config, args.workdir)
    except Preempted as event:
        print(f"c2f train: {event}", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    if result is not None:
        print(format_table(result))
        print(f"\nresults page: {page}")
    return 0


def _evaluate(args, _):
    from c2f_jax.evaluate import evaluate_by_voice, evaluate_source, load_trained
    from c2f_jax.experiment import load_saved_config
    from c2f_jax.retrieval.evaluation import format_table

    config = load_saved_config(args.workdir)
    if args.data:
        config.data.name = args.data
        for part in ("speech", "image"):  # the run's feature cache is not of this data
            if config.model[part].get("name") == "published":
                config.data[f"{part}_features"] = None
    if args.k:
        config.eval.k = args.k
    if args.score:
        config.eval.score = args.score
    experiment, params, step, history = load_trained(args.workdir, step=args.step, config=config)
    source = experiment.data.load(args.split or experiment.data.test_split)
    if args.by_voice:
        for name, result in evaluate_by_voice(experiment, params, source, args.workdir, step=step).items():
            print(f"voices {name} in training, {result['queries']['gallery_recordings']} recordings")
            print(format_table(result))
        return
    result, page = evaluate_source(experiment, params, source, args.workdir, step=step, history=history)
    print(format_table(result))
    print(f"\nresults page: {page}")


def _index(args, _):
    from c2f_jax.search import build_index

    index = build_index(args.workdir, args.gallery, kind=args.kind, split=args.split, step=args.step)
    index.save(args.output)
    print(f"{len(index.names)} items indexed: {args.output}")


def _search(args, _):
    from c2f_jax.search import search

    page = search(
        args.workdir,
        audio=args.audio or (),
        say=args.say or (),
        images=args.image or (),
        gallery=args.gallery,
        split=args.split,
        index=args.index,
        step=args.step,
        k=args.k,
        top=args.top,
        output=args.output,
    )
    print(f"\nanswers: {page}")


def _convert(args, _):
    from c2f_jax.pretrained.convert import convert

    normalise = None if args.normalise is None else args.normalise == "true"
    card = convert(args.source, args.output, normalise=normalise, licence=args.licence)
    print(f"{card['layout']}: {card['parameters']:,} parameters, licence {card['licence']}: {args.output}")


def _features(args, _):
    from c2f_jax.data.pairs import load_pairs
    from c2f_jax.distributed import initialize

    if args.distributed or args.coordinator:
        initialize(args.coordinator, args.num_processes, args.process_id)
    from c2f_jax.pretrained.features import extract_features

    sources = [load_pairs(args.data, split, args.data_dir) for split in args.splits.split(",")]
    cache = extract_features(
        args.weights,
        sources,
        args.output,
        layer=args.layer,
        max_seconds=args.max_seconds,
        batch_size=args.batch_size,
    )
    for source in sources:
        for name, reason in source.bad_items.reasons.items():
            print(f"left out: {name}: {reason}")
    print(f"features of {len(cache)} items: {args.output}")


def _ablate(args, overrides):
    from c2f_jax.ablate import ablate

    rows = args.rows.split(",") if args.rows else None
    print(ablate(load_config(args.config, overrides), args.workdir, seeds=args.seeds, noise=args.noise, rows=rows))


if __name__ == "__main__":
    sys.exit(main())
