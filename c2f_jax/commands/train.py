"""``c2f train``: train a model, resume a run, evaluate the best checkpoint."""

import sys
from argparse import ArgumentParser, Namespace

from c2f_jax.commands import arguments

SUMMARY = "Train a model, then evaluate its best checkpoint on the test split."
EXAMPLES = """\
  c2f train --config=spoken_scenes --workdir=runs/scenes --config.steps=1000
  c2f train --config=manifest:path/to/manifest.jsonl --workdir=runs/mine
To resume an interrupted run, repeat its command. docs/options.md explains every option."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f train``."""
    arguments.add_config(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        type=arguments.directory,
        help="directory of the run, local or gs://; an existing run is resumed",
    )
    parser.add_argument(
        "--zero-shot",
        nargs="+",
        default=[],
        metavar="DATA",
        help="evaluate on these as well: protocols, data sets or manifests (their test split)",
    )
    parser.add_argument("--by-voice", action="store_true", help=arguments.BY_VOICE_HELP)
    arguments.add_distributed(parser)


def run(args: Namespace) -> int:
    """Train and evaluate; the exit status is 42 if the run was stopped and can be resumed."""
    from c2f_jax.config.experiment import create_experiment
    from c2f_jax.config.files import load_config

    config = load_config(args.config, args.overrides)
    arguments.join_processes(args)

    from c2f_jax.commands.evaluate import evaluate_by_voice, evaluate_on, open_target
    from c2f_jax.retrieval.voices import check_voices
    from c2f_jax.train import train_and_evaluate
    from c2f_jax.training import preemption
    from c2f_jax.training.distributed import first_process_first, in_every_process, say

    experiment = create_experiment(config)

    # Open the targets before training, so that a typo does not surface hours later.
    def open_targets() -> None:
        for target in args.zero_shot:
            open_target(experiment, target)
        if args.by_voice:
            data = experiment.data
            check_voices(data.load(data.test_split, features=False))

    stopped = preemption.Preempted("stopped; repeat the command to go on from there")
    try:
        with preemption.raise_on_sigterm(stopped):
            in_every_process(lambda: first_process_first(open_targets))
            result = train_and_evaluate(config, args.workdir)
            say(result.table())
            say(f"\nresults page: {result.page}")
            if args.by_voice:
                evaluate_by_voice(experiment, args.workdir)
            for target in args.zero_shot:
                say(f"\nzero-shot: {target}")
                evaluate_on(experiment, args.workdir, target=target)
    except preemption.Preempted as event:
        print(f"c2f train: {event}", file=sys.stderr)
        return preemption.EXIT_CODE
    return 0
