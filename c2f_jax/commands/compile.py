"""``c2f compile``: what a run takes on TPUs or GPUs that are not here."""

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from c2f_jax.commands import arguments

if TYPE_CHECKING:
    from c2f_jax.compile import Plan

SUMMARY = "Compile the training step for TPUs or GPUs without one: memory, traffic, seconds."
EXAMPLES = """\
  c2f compile --config=spoken_scenes --topology=v5e:2x4
  c2f compile --config=flickr8k_audio:base_finetuned --topology=v5e:4x8 --topology=v5p:2x2x4 \\
      --config.batch_size=1024
The chips are v4, v5e, v5p, v6e, tpu7x and h100. The shape is that of the slice: v5e:2x4 has 8
chips, v5e:16x16 256, v5p:4x4x8 128; h100:8 is one host, h100:4x8 are four. Neither data nor weights
are needed, and no account.
The exit status is 3 if the run does not fit on one of the slices."""
DOES_NOT_FIT = 3


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``c2f compile``."""
    arguments.add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        action="append",
        metavar="CHIP:SHAPE",
        help="slice to compile for, such as v5e:2x4; repeat it to compare slices",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: Namespace) -> int:
    """Compile for each slice; the exit status is 3 if the run does not fit on one of them."""
    # The slices are described by the compiler: a TPU of this machine is left alone.
    import jax

    jax.config.update("jax_platforms", "cpu")

    from tqdm import tqdm

    from c2f_jax.compile import EFFICIENCY, advice, compile_for
    from c2f_jax.config.files import load_config

    config = load_config(args.config, args.overrides)
    plans = []
    for name in tqdm(args.topology, desc="compiling", unit="slice", leave=False):
        plans.append(compile_for(config, name))

    too_small = [plan for plan in plans if not plan.fits]
    if args.json:
        print(json.dumps([plan.to_json() for plan in plans], indent=2))
    else:
        print(_table(plans))
        for plan in plans:
            print(_details(plan))
        print(
            f"\nOne step in the longest bucket; seconds at {EFFICIENCY:.0%} of the chip's peak "
            "figures. Evaluation is not included."
        )
    for plan in too_small:
        changes = "\n".join(f"  {change}" for change in advice(config, plan))
        print(
            f"{plan.topology} has {_size(plan.capacity)} a chip, and the run takes "
            f"{_size(plan.used)}; what helps:\n{changes}",
            file=sys.stderr,
        )
    return DOES_NOT_FIT if too_small else 0


def _table(plans: "list[Plan]") -> str:
    """Return a line for each slice."""
    head = ("slice", "chips", "batch", "memory a chip", "", "compute", "memory", "network", "step")
    rows: list[tuple[str, ...]] = [(*head, "pairs/s", "hours")]
    for plan in plans:
        seconds = (plan.compute_seconds, plan.memory_seconds, plan.network_seconds)
        known = plan.is_compiled
        rows.append(
            (
                plan.topology,
                str(plan.chips),
                str(plan.batch_size),
                f"{_size(plan.used)} of {_size(plan.capacity)}",
                "fits" if plan.fits else "does not fit",
                *(_time(value) if known else "-" for value in (*seconds, plan.step_seconds)),
                f"{plan.batch_size / plan.step_seconds:,.0f}" if known else "-",
                f"{plan.steps * plan.step_seconds / 3600:.2f}" if known else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def _details(plan: "Plan") -> str:
    """Return what fills the memory and what travels."""
    memory = ", ".join(f"{name} {_size(size)}" for name, size in plan.memory.items())
    operations = plan.operations
    lines = [
        f"\n{plan.topology}, a chip: {memory}",
        f"  {operations.flops / 1e12:.3f} TFLOP a step"
        f" ({operations.bfloat16_flops / 1e12:.3f} in bfloat16 passes), {_size(plan.moved)} to and"
        f" from memory, {_size(plan.sent)} sent; compiled in {plan.compile_seconds:.0f} s",
    ]
    for collective in plan.collectives[:8]:
        lines.append(
            f"  {collective.count} {collective.kind} of {_size(collective.size)} in groups of "
            f"{collective.group}: {_size(collective.sent)} sent"
        )
    rest = plan.collectives[8:]
    if rest:
        count = sum(collective.count for collective in rest)
        lines.append(f"  {count} smaller: {_size(sum(c.sent for c in rest))} sent")
    return "\n".join(lines)


def _size(count: float) -> str:
    """Return bytes with a binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
