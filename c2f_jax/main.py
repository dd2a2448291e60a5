"""The ``c2f`` command: train, evaluate, index, search, ablate, convert, features, data check, data prepare."""

import json
import logging
import os
import sys

from c2f_jax.command_line import create_parser
from c2f_jax.config.files import load_config
from c2f_jax.errors import UserError


def main(argv=None):
    """Run the command line; returns the exit status (0 done, 2 a mistake that the user can mend, 42 preempted)."""
    parser = create_parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and not args.takes_config):
        args.parser.error(
            f"unknown argument {(unknown or overrides)[0]}; see {args.parser.prog} --help"
        )
    # jax and TensorFlow announce on import what hardware they did not find; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault(
        "TF_ENABLE_ONEDNN_OPTS", "0"
    )  # else TensorFlow greets with a notice about it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # Orbax warns of each read-only directory that it opens
    try:
        return _COMMANDS[args.name](args, overrides) or 0
    except UserError as error:
        print(f"{args.parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: interrupted", file=sys.stderr)
        return 130


def _join_processes(args):
    """Whether this is one process of several."""
    given = (args.coordinator, args.num_processes, args.process_id)
    several = args.distributed or any(value is not None for value in given)
    if several:
        from c2f_jax.training.distributed import initialize

        initialize(*given)
    return several


def _train(args, overrides):
    config = load_config(args.config, overrides)
    several = _join_processes(args)
    from c2f_jax.config.experiment import create_experiment
    from c2f_jax.retrieval.evaluation import format_table
    from c2f_jax.retrieval.voices import check_voices
    from c2f_jax.train import PREEMPTED_EXIT_CODE, Preempted, train_and_evaluate

    if several and (args.zero_shot or args.by_voice):
        raise UserError(
            "--zero-shot and --by-voice are for one process: run `c2f evaluate` afterwards"
        )
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
    from c2f_jax.evaluate import evaluate_source
    from c2f_jax.inference import load_trained
    from c2f_jax.retrieval.evaluation import format_table
    from c2f_jax.retrieval.protocols import format_protocol

    source, protocol = _open_target(experiment, target, split, protocol)
    _, params, step, history = load_trained(workdir, step=step, experiment=experiment)
    result, page = evaluate_source(
        experiment, params, source, workdir, step=step, history=history, protocol=protocol
    )
    print(format_protocol(result) + format_table(result))
    print(f"\nresults page: {page}")


def _evaluate_by_voice(experiment, workdir, step, target, split=None):
    from c2f_jax.evaluate import evaluate_by_voice
    from c2f_jax.inference import load_trained
    from c2f_jax.retrieval.evaluation import format_table

    source, _ = _open_target(experiment, target, split)
    _, params, step, _ = load_trained(workdir, step=step, experiment=experiment)
    for name, result in evaluate_by_voice(experiment, params, source, workdir, step=step).items():
        print(f"voices {name} in training, {result['queries']['gallery_recordings']} recordings")
        print(format_table(result))


def _evaluate(args, _):
    from c2f_jax.config.experiment import create_experiment
    from c2f_jax.config.files import load_saved_config

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
    from c2f_jax.search import build_index

    index = build_index(
        args.workdir, args.gallery, kind=args.kind, split=args.split, step=args.step
    )
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
    print(
        f"{card['layout']}: {card['parameters']:,} parameters, licence {card['licence']}: {args.output}"
    )


def _features(args, _):
    _join_processes(args)
    from c2f_jax.datasets.registry import load_pairs, make_data_set
    from c2f_jax.pretrained.extract_features import extract_features
    from c2f_jax.training.distributed import first_process_first

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
    from c2f_jax.data_check.check import check_data
    from c2f_jax.data_check.clean_manifest import check_name, write_clean_manifest
    from c2f_jax.data_check.findings import EXIT_CODES

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

        from c2f_jax.data_check.page import write_check_page

        folder = epath.Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(json.dumps(report.json(), indent=2) + "\n")
        write_check_page(folder / "check.html", report)
        print(f"report: {folder / 'check.html'}, {folder / 'check.json'}")
    if args.fix:
        print(f"{write_clean_manifest(report, args.fix):,} pairs written: {args.fix}")
    return EXIT_CODES[report.severity]


def _data_prepare(args, _):
    from c2f_jax.datasets.prepare import dry_run, prepare

    if args.dry_run:
        print(
            dry_run(args.data, manual_dir=args.manual_dir, data_dir=args.data_dir, name=args.name)
        )
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


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "index": _index,
    "search": _search,
    "ablate": _ablate,
    "convert": _convert,
    "features": _features,
    "check": _data_check,
    "prepare": _data_prepare,
}


if __name__ == "__main__":
    sys.exit(main())
