"""The ``c2f`` command: train, evaluate, index, search, ablate, convert, features, data check, data prepare."""

import argparse
import difflib
import json
import logging
import os
import sys

from c2f_jax.errors import UserError

EXAMPLES = {
    "c2f": """\
A run from data to pictures:
  c2f train --config=configs/spoken_scenes.py --workdir=runs/scenes
  c2f evaluate --workdir=runs/scenes --split=validation
  c2f search --workdir=runs/scenes --say "a small red circle above a large blue square"
c2f COMMAND --help says more of each.""",
    "train": """\
  c2f train --config=configs/spoken_scenes.py --workdir=runs/scenes --config.steps=1000
  c2f train --config=configs/manifest.py:path/to/manifest.jsonl --workdir=runs/mine
The same command goes on where a run stopped. c2f_jax/config.py lists every value.""",
    "evaluate": """\
  c2f evaluate --workdir=runs/scenes --split=validation --k=64
  c2f evaluate --workdir=runs/scenes --data=path/to/manifest.jsonl
Writes <workdir>/eval/<data set>-<split>.json, .html and .png.""",
    "index": """\
  c2f index --workdir=runs/scenes --gallery=path/to/pictures --output=gallery.npz
  c2f search --workdir=runs/scenes --index=gallery.npz --audio question.wav""",
    "search": """\
  c2f search --workdir=runs/scenes --say "a small red circle" "a big yellow star"
  c2f search --workdir=runs/scenes --gallery=path/to/pictures --audio question.wav
  c2f search --workdir=runs/scenes --image picture.jpg""",
    "ablate": """\
  c2f ablate --config=configs/spoken_scenes.py:simple --workdir=runs/ablation
  c2f ablate --config=configs/spoken_scenes.py:simple --workdir=runs/sim --rows "+ embedding queue" "+ SIM"
Writes <workdir>/table.md and table.json.""",
    "convert": """\
  c2f convert path/to/whisper-tiny.en --output=weights/whisper_tiny_en
  c2f convert facebook/hubert-base-ls960 --output=weights/hubert_base""",
    "features": """\
  c2f features --weights=weights/hubert_base --data=path/to/manifest.jsonl --output=features/hubert
  c2f train --config=... --workdir=... --config.data.speech_features=features/hubert""",
    "check": """\
  c2f data check path/to/manifest.jsonl --output=check --fix=clean.jsonl
  c2f data check flickr8k_audio --manual-dir=downloads""",
    "prepare": """\
  c2f data prepare flickr8k_audio --dry-run
  c2f data prepare flickr8k_audio --manual-dir=downloads
  c2f data prepare path/to/manifest.jsonl""",
}


def main(argv=None):
    """Run the command line; returns the exit status (0 done, 2 a mistake that the user can mend, 42 preempted)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and not args.takes_config):
        args.parser.error(f"unknown argument {(unknown or overrides)[0]}; see {args.parser.prog} --help")
    # jax and TensorFlow announce on import what hardware they did not find; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow greets with a notice about it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of each read-only directory that it opens
    try:
        return args.run(args, overrides) or 0
    except UserError as error:
        print(f"{args.parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: interrupted", file=sys.stderr)
        return 130


def load_config(path, overrides=()):
    """A locked ConfigDict from ``file.py[:argument]`` with ``--config.key=value`` overrides applied.

    Raises:
      UserError: no such file, argument that it does not take, unknown key (with the nearest known one), value of
        another type.
    """
    file = path.partition(":")[0]
    if not os.path.isfile(file):
        raise UserError(f"--config={path}: there is no file {file}; the repository's are in configs/")
    known = _keys(_read_config(path, ()))
    for word in overrides:
        key = word.partition("=")[0].removeprefix("--config.")
        if key not in known:
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside:
                raise UserError(f"--config.{key} is a section: give a value of it, {', '.join(inside)}")
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean --config.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"the configuration has no {key}: {hint}")
    return _read_config(path, overrides)


def _read_config(path, overrides):
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    values, argv = flags.FlagValues(), ["c2f", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values["config"].value
        if not isinstance(config, ConfigDict):
            raise ValueError(f"get_config returns {type(config).__name__}, a ConfigDict is expected")
        return config
    except Exception as error:  # a configuration is a program, which may fail in any way
        # What it raises for its argument comes as the text of a traceback, whose last line tells it.
        reason = (str(error).strip() or "no reason given").splitlines()[-1].removeprefix("ValueError: ")
        kind = "" if isinstance(error, flags.Error | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config={path}: {kind}{reason}") from error


def _keys(config, prefix=""):
    keys = []
    for key, value in config.items():
        keys += _keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key]
    return keys


def _parser():
    parser = argparse.ArgumentParser(
        prog="c2f",
        description="Speech-image retrieval, coarse to fine: train on spoken captions and pictures, search by voice",
        epilog=EXAMPLES["c2f"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, summary, takes_config=False, to=commands):
        sub = to.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
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
    train.add_argument(
        "--workdir",
        required=True,
        type=_directory,
        help="directory of the run, local or gs://; an existing run goes on",
    )
    train.add_argument(
        "--zero-shot",
        nargs="+",
        default=[],
        metavar="DATA",
        help="evaluate afterwards on these too: protocols, or other data sets and manifests (their test split)",
    )
    by_voice = {"action": "store_true", "help": "voices heard in training and others apart, on all pictures"}
    train.add_argument("--by-voice", **by_voice)
    _distributed_arguments(train)

    evaluate = add(
        "evaluate", _evaluate, "Coarse and fine retrieval on a split, with intervals, JSON and an HTML page."
    )
    evaluate.add_argument("--workdir", required=True, type=_directory, help="directory of a training run")
    evaluate.add_argument("--data", help="another data set or manifest (zero-shot); the run's own by default")
    evaluate.add_argument("--split", help="split; the protocol's, else the run's test split, by default")
    evaluate.add_argument(
        "--step", default="best", help="best, latest or the number of a checkpoint (default: %(default)s)"
    )
    how = evaluate.add_mutually_exclusive_group()
    how.add_argument(
        "--protocol", help="flickr8k_1k, spoken_coco_5k, spoken_coco_1k_5fold, places_1k or mteb, with its own data set"
    )
    how.add_argument("--by-voice", **by_voice)
    evaluate.add_argument("--k", type=int, help="candidates that SIM re-ranks; the run's value by default")
    evaluate.add_argument("--score", help="ranking of the fine stage: sic, sim, sum, prob or joint")

    index = add("index", _index, "Encode a gallery once, to be searched many times.")
    search = add("search", _search, "Search pictures by voice, or recordings by a picture.")
    for sub in (index, search):
        sub.add_argument("--workdir", required=True, type=_directory, help="directory of a training run")
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
        "--workdir",
        required=True,
        type=_directory,
        help="directory for all the runs and the table; finished runs are kept",
    )
    ablate.add_argument("--seeds", type=int, default=3, help="seeds of each row (default: %(default)s)")
    ablate.add_argument(
        "--noise", type=float, default=0.3, help="share of shuffled captions in the noisy rows (default: %(default)s)"
    )
    ablate.add_argument("--rows", nargs="+", metavar="ROW", help="names of rows, as the table has them; all by default")
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

    data = commands.add_parser("data", help="Check a data set, or prepare one.")
    data_commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    check = add(
        "check",
        _data_check,
        "Decode every item of a data set and say what is wrong: exit status 0 passed, 1 warnings, 3 errors.",
        to=data_commands,
    )
    prepare = add(
        "prepare",
        _data_prepare,
        "From downloaded folders or a manifest to a prepared set; an interrupted run goes on.",
        to=data_commands,
    )
    for sub in (check, prepare):
        sub.add_argument("data", help="flickr8k_audio, spoken_coco, places_audio, spoken_scenes or a manifest")
        sub.add_argument("--manual-dir", help="folder of the downloaded parts of a published data set")
        sub.add_argument("--data-dir", help="directory of prepared sets, local or gs://; TFDS's default unless given")
        sub.add_argument("--threads", type=int, help="threads that decode; one a core unless given")
    check.add_argument("--output", metavar="DIR", help="write check.json and check.html, with players, here")
    check.add_argument("--fix", metavar="FILE", help="write a manifest (.jsonl) of what can be used")
    check.add_argument("--max-seconds", type=float, default=30.0, help="longer recordings are reported (%(default)s)")
    prepare.add_argument("--dry-run", action="store_true", help="say what is missing, where to get it, how large it is")
    prepare.add_argument("--download", action="store_true", help="fetch missing parts that have a direct link")
    prepare.add_argument("--name", help="name of the prepared set of a manifest; its folder's unless given")
    prepare.add_argument(
        "--max-bad-share", type=float, default=0.01, help="share of bad items that are left out (default: %(default)s)"
    )
    return parser


def _directory(text):
    if not text:  # as from an unset variable of a shell; it would be the current directory
        raise argparse.ArgumentTypeError("a directory is expected")
    return text


def _distributed_arguments(parser):
    group = parser.add_argument_group(
        "several processes", "On a TPU pod or under Slurm --distributed alone finds its peers; elsewhere name them."
    )
    group.add_argument("--distributed", action="store_true", help="one process of several")
    group.add_argument("--coordinator", help="host:port of process 0")
    group.add_argument("--num-processes", type=int, help="number of processes")
    group.add_argument("--process-id", type=int, help="number of this process, from 0")


def _join_processes(args):
    """Whether this is one process of several."""
    given = (args.coordinator, args.num_processes, args.process_id)
    several = args.distributed or any(value is not None for value in given)
    if several:
        from c2f_jax.distributed import initialize

        initialize(*given)
    return several


def _train(args, overrides):
    config = load_config(args.config, overrides)
    several = _join_processes(args)
    from c2f_jax.experiment import create_experiment
    from c2f_jax.retrieval.evaluation import format_table
    from c2f_jax.retrieval.voices import check_voices
    from c2f_jax.train import PREEMPTED_EXIT_CODE, Preempted, train_and_evaluate

    if several and (args.zero_shot or args.by_voice):
        raise UserError("--zero-shot and --by-voice are for one process: run `c2f evaluate` afterwards")
    # Before the training, so that what cannot be evaluated is not found hours later.
    for target in args.zero_shot:
        _open_target(create_experiment(config), target)
    if args.by_voice:
        data = create_experiment(config).data
        check_voices(data.load(data.test_split, features=False))
    try:
        _, _, result, page = train_and_evaluate(config, args.workdir)
    except Preempted as event:
        print(f"c2f train: {event}", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    if result is not None:
        print(format_table(result))
        print(f"\nresults page: {page}")
        if args.by_voice:
            _evaluate_by_voice(create_experiment(config), args.workdir, "best", None)
        for target in args.zero_shot:
            print(f"\nzero-shot: {target}")
            _evaluate_on(create_experiment(config), args.workdir, "best", target)
    return 0


def _open_target(experiment, target, split=None, protocol=None):
    """(source, protocol or None) of a protocol's name, a data set or a manifest."""
    from c2f_jax.retrieval.protocols import PROTOCOLS, find_protocol, open_protocol

    def load(name, split):
        return experiment.data_of(name).load(split)

    if protocol is None and target in PROTOCOLS:
        protocol, target = target, None
    if protocol is None:
        return load(target or experiment.data.name, split or experiment.data.test_split), None
    protocol = find_protocol(protocol)
    return open_protocol(protocol, load, target, split), protocol


def _evaluate_on(experiment, workdir, step, target, split=None, protocol=None):
    from c2f_jax.evaluate import evaluate_source, load_trained
    from c2f_jax.retrieval.evaluation import format_table
    from c2f_jax.retrieval.protocols import format_protocol

    source, protocol = _open_target(experiment, target, split, protocol)
    _, params, step, history = load_trained(workdir, step=step, experiment=experiment)
    result, page = evaluate_source(experiment, params, source, workdir, step=step, history=history, protocol=protocol)
    print(format_protocol(result) + format_table(result))
    print(f"\nresults page: {page}")


def _evaluate_by_voice(experiment, workdir, step, target, split=None):
    from c2f_jax.evaluate import evaluate_by_voice, load_trained
    from c2f_jax.retrieval.evaluation import format_table

    source, _ = _open_target(experiment, target, split)
    _, params, step, _ = load_trained(workdir, step=step, experiment=experiment)
    for name, result in evaluate_by_voice(experiment, params, source, workdir, step=step).items():
        print(f"voices {name} in training, {result['queries']['gallery_recordings']} recordings")
        print(format_table(result))


def _evaluate(args, _):
    from c2f_jax.experiment import create_experiment, load_saved_config

    config = load_saved_config(args.workdir)
    if args.k is not None:
        config.eval.k = args.k
    if args.score is not None:
        config.eval.score = args.score
    experiment = create_experiment(config)
    if args.by_voice:
        _evaluate_by_voice(experiment, args.workdir, args.step, args.data, args.split)
    else:
        _evaluate_on(experiment, args.workdir, args.step, args.data, args.split, args.protocol)


def _index(args, _):
    from c2f_jax.gallery import build_index

    index = build_index(args.workdir, args.gallery, kind=args.kind, split=args.split, step=args.step)
    index.save(args.output)
    print(f"{len(index.names)} items indexed: {args.output}")


def _search(args, _):
    from c2f_jax.gallery import search

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
    _join_processes(args)
    from c2f_jax.data.pairs import load_pairs, make_data_set
    from c2f_jax.distributed import first_process_first
    from c2f_jax.pretrained.features import extract_features

    first_process_first(lambda: make_data_set(args.data, args.data_dir))
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


def _data_check(args, _):
    from c2f_jax.data.check import EXIT_CODES, check_data
    from c2f_jax.data.clean_manifest import check_name, write_clean_manifest

    if args.fix:
        check_name(args.fix)  # before hours of decoding
    report = check_data(
        args.data,
        manual_dir=args.manual_dir,
        data_dir=args.data_dir,
        max_seconds=args.max_seconds,
        threads=args.threads,
    )
    print(report.text())
    if args.output:
        from etils import epath

        from c2f_jax.data.check_page import write_check_page

        folder = epath.Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(json.dumps(report.json(), indent=2) + "\n")
        write_check_page(folder / "check.html", report)
        print(f"report: {folder / 'check.html'}, {folder / 'check.json'}")
    if args.fix:
        print(f"{write_clean_manifest(report, args.fix):,} pairs written: {args.fix}")
    return EXIT_CODES[report.severity]


def _data_prepare(args, _):
    from c2f_jax.data.prepare import dry_run, prepare

    if args.dry_run:
        print(dry_run(args.data, manual_dir=args.manual_dir, data_dir=args.data_dir, name=args.name))
        return
    ready = prepare(
        args.data,
        manual_dir=args.manual_dir,
        data_dir=args.data_dir,
        name=args.name,
        download=args.download,
        threads=args.threads,
        max_bad_share=args.max_bad_share,
    )
    print(f"prepared; use it with --config.data.name={ready}")


def _ablate(args, overrides):
    from c2f_jax.ablate import ablate

    config = load_config(args.config, overrides)
    print(ablate(config, args.workdir, seeds=args.seeds, noise=args.noise, rows=args.rows))


if __name__ == "__main__":
    sys.exit(main())
