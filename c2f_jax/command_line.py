"""What the ``c2f`` command takes: its commands, their arguments, their help."""

import argparse

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


def create_parser():
    """The parser of the command line; what it parses has the ``name`` of the command that is to run."""
    parser = argparse.ArgumentParser(
        prog="c2f",
        description="Speech-image retrieval, coarse to fine: train on spoken captions and pictures, search by voice",
        epilog=EXAMPLES["c2f"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, summary, takes_config=False, to=commands):
        sub = to.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(name=name, parser=sub, takes_config=takes_config)
        return sub

    train = add(
        "train", "Train, resume, evaluate the best checkpoint on the test split.", takes_config=True
    )
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
    by_voice = {
        "action": "store_true",
        "help": "voices heard in training and others apart, on all pictures",
    }
    train.add_argument("--by-voice", **by_voice)
    _distributed_arguments(train)

    evaluate = add(
        "evaluate", "Coarse and fine retrieval on a split, with intervals, JSON and an HTML page."
    )
    evaluate.add_argument(
        "--workdir", required=True, type=_directory, help="directory of a training run"
    )
    evaluate.add_argument(
        "--data", help="another data set or manifest (zero-shot); the run's own by default"
    )
    evaluate.add_argument(
        "--split", help="split; the protocol's, else the run's test split, by default"
    )
    evaluate.add_argument(
        "--step",
        default="best",
        help="best, latest or the number of a checkpoint (default: %(default)s)",
    )
    how = evaluate.add_mutually_exclusive_group()
    how.add_argument(
        "--protocol",
        help="flickr8k_1k, spoken_coco_5k, spoken_coco_1k_5fold, places_1k or mteb, with its own data set",
    )
    how.add_argument("--by-voice", **by_voice)
    evaluate.add_argument(
        "--k", type=int, help="candidates that SIM re-ranks; the run's value by default"
    )
    evaluate.add_argument("--score", help="ranking of the fine stage: sic, sim, sum, prob or joint")

    index = add("index", "Encode a gallery once, to be searched many times.")
    search = add("search", "Search pictures by voice, or recordings by a picture.")
    for sub in (index, search):
        sub.add_argument(
            "--workdir", required=True, type=_directory, help="directory of a training run"
        )
        sub.add_argument(
            "--step",
            default="best",
            help="best, latest or the number of a checkpoint (default: %(default)s)",
        )
        sub.add_argument(
            "--gallery",
            help="folder of files, data set name or manifest; the run's own data by default",
        )
        sub.add_argument(
            "--split", help="split of a data set or manifest; the run's test split by default"
        )
    index.add_argument(
        "--kind",
        choices=("image", "speech"),
        default="image",
        help="what to index (default: %(default)s)",
    )
    index.add_argument("--output", required=True, help="index file to write (.npz), local or gs://")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument(
        "--audio", nargs="+", metavar="FILE", help="recordings that describe pictures"
    )
    query.add_argument(
        "--say",
        nargs="+",
        metavar="TEXT",
        help="sentences, spoken by espeak-ng and used as recordings",
    )
    query.add_argument(
        "--image", nargs="+", metavar="FILE", help="pictures, to find recordings that describe them"
    )
    search.add_argument("--index", help="a file of `c2f index`, in place of --gallery")
    search.add_argument(
        "--top", type=int, default=5, help="answers shown for each query (default: %(default)s)"
    )
    search.add_argument(
        "--k", type=int, help="candidates that SIM re-ranks; the run's value by default"
    )
    search.add_argument(
        "--output",
        help="page of the answers (.html); <workdir>/search.html by default, with a .png beside it",
    )

    ablate = add(
        "ablate",
        "The paper's claims as an experiment: one row an idea, several seeds.",
        takes_config=True,
    )
    ablate.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="configuration that the rows vary"
    )
    ablate.add_argument(
        "--workdir",
        required=True,
        type=_directory,
        help="directory for all the runs and the table; finished runs are kept",
    )
    ablate.add_argument(
        "--seeds", type=int, default=3, help="seeds of each row (default: %(default)s)"
    )
    ablate.add_argument(
        "--noise",
        type=float,
        default=0.3,
        help="share of shuffled captions in the noisy rows (default: %(default)s)",
    )
    ablate.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="names of rows, as the table has them; all by default",
    )
    convert = add(
        "convert",
        "Published weights to a folder that model.speech.weights or model.image.weights name.",
    )
    convert.add_argument(
        "source", nargs="+", help="files or folders as published, or a hub id owner/name"
    )
    convert.add_argument("--output", required=True, help="folder to write")
    convert.add_argument(
        "--normalise",
        choices=("true", "false"),
        help="whether waveforms have mean 0 and variance 1, where the publisher's files do not say",
    )
    convert.add_argument("--licence", help="for the card, where no README says")

    features = add(
        "features", "Run a frozen published network once over a data set and keep its tokens."
    )
    features.add_argument(
        "--weights", required=True, help="folder of c2f convert, or published files"
    )
    features.add_argument("--data", required=True, help="data set name or manifest")
    features.add_argument("--data-dir", help="where prepared data sets are")
    features.add_argument(
        "--splits", default="train,validation,test", help="comma-separated (default: %(default)s)"
    )
    features.add_argument(
        "--output", required=True, help="folder of the cache; an unfinished one is gone on with"
    )
    features.add_argument(
        "--layer",
        default="last",
        help="last, the number of a hidden state, or all (default: %(default)s)",
    )
    features.add_argument(
        "--max-seconds",
        type=float,
        default=30.0,
        help="recordings are cut to this length (default: %(default)s)",
    )
    features.add_argument(
        "--batch-size", type=int, default=16, help="items at once (default: %(default)s)"
    )
    _distributed_arguments(features)

    data = commands.add_parser("data", help="Check a data set, or prepare one.")
    data_commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    check = add(
        "check",
        "Decode every item of a data set and say what is wrong: exit status 0 passed, 1 warnings, 3 errors.",
        to=data_commands,
    )
    prepare = add(
        "prepare",
        "From downloaded folders or a manifest to a prepared set; an interrupted run goes on.",
        to=data_commands,
    )
    for sub in (check, prepare):
        sub.add_argument(
            "data", help="flickr8k_audio, spoken_coco, places_audio, spoken_scenes or a manifest"
        )
        sub.add_argument(
            "--manual-dir", help="folder of the downloaded parts of a published data set"
        )
        sub.add_argument(
            "--data-dir",
            help="directory of prepared sets, local or gs://; TFDS's default unless given",
        )
        sub.add_argument("--threads", type=int, help="threads that decode; one a core unless given")
    check.add_argument(
        "--output", metavar="DIR", help="write check.json and check.html, with players, here"
    )
    check.add_argument(
        "--fix", metavar="FILE", help="write a manifest (.jsonl) of what can be used"
    )
    check.add_argument(
        "--max-seconds",
        type=float,
        default=30.0,
        help="longer recordings are reported (%(default)s)",
    )
    prepare.add_argument(
        "--dry-run",
        action="store_true",
        help="say what is missing, where to get it, how large it is",
    )
    prepare.add_argument(
        "--download", action="store_true", help="fetch missing parts that have a direct link"
    )
    prepare.add_argument(
        "--name", help="name of the prepared set of a manifest; its folder's unless given"
    )
    prepare.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        help="share of bad items that are left out (default: %(default)s)",
    )
    return parser


def _directory(text):
    if not text:  # as from an unset variable of a shell; it would be the current directory
        raise argparse.ArgumentTypeError("a directory is expected")
    return text


def _distributed_arguments(parser):
    group = parser.add_argument_group(
        "several processes",
        "On a TPU pod or under Slurm --distributed alone finds its peers; elsewhere name them.",
    )
    group.add_argument("--distributed", action="store_true", help="one process of several")
    group.add_argument("--coordinator", help="host:port of process 0")
    group.add_argument("--num-processes", type=int, help="number of processes")
    group.add_argument("--process-id", type=int, help="number of this process, from 0")
