"""What the shipped configurations take on TPU slices, by the TPU compiler; no TPU is needed.

    python benchmarks/slices.py --output=slices.json           # hours: every program is compiled
    python benchmarks/slices.py --configs flickr8k_audio:base_finetuned --slices v5e:2x4 v5e:16x16

The batch grows with the slice: on 8 chips it is that of the configuration, and the rows of a chip
stay the same. Each plan is appended to --output as a line of JSON; those that are there already are
not compiled again. Then it prints the table of docs/devices.md: memory of a chip, what it sends to
others in a step, a step's seconds at half of the peak figures, and the efficiency, which is the
speed of a chip compared with that on the smallest slice of the same kind. --plot draws bytes and
seconds over the number of chips.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

CONFIGS = (
    "spoken_scenes",
    "flickr8k_audio:light",
    "flickr8k_audio:base",
    "flickr8k_audio:large",
    "flickr8k_audio:base_finetuned",
    "flickr8k_audio:large_finetuned",
)
SLICES = ("v5e:2x4", "v5e:4x8", "v5e:16x16", "v5p:8x8x16")


def chips_of(name):
    """Return the number of chips of a slice."""
    count = 1
    for side in name.partition(":")[2].split("x"):
        count *= int(side)
    return count


def plan(config, name, rows):
    """Compile in a process of its own, so that memory is free afterwards."""
    words = [sys.executable, "-m", "c2f_jax.main", "compile", "--json", f"--config={config}"]
    words += [f"--topology={name}", f"--config.batch_size={rows * chips_of(name)}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)[0] | {"config": config}


def row(found, first):
    """Return a line of the table."""
    seconds, pairs = found.get("step_seconds", 0.0), found.get("pairs_per_second", 0.0)
    fits, of_first = found["fits"], first.get("pairs_per_second", 0.0) / first["chips"]
    cells = [
        f"`{found['config']}`",
        f"`{found['topology']}`",
        f"{found['chips']:,}",
        f"{found['batch_size']:,}",
        f"{found['used'] / 2**30:.1f} of {found['capacity'] / 2**30:.0f}",
        f"{found['operations']['bfloat16_flops'] / 1e12:.2f}",
        f"{found['sent'] / 1e6:,.0f}" if fits else "-",
        f"{1e3 * seconds:,.1f}" if fits else "does not fit",
        f"{pairs:,.0f}" if fits else "-",
        f"{pairs / found['chips'] / of_first:.0%}"
        if fits and of_first and found is not first
        else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def plot(path, known):
    """Draw what a chip sends and a step's seconds over the chips, for each configuration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (sent, seconds) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = {}
    for (config, name), found in known.items():
        if "step_seconds" in found:
            lines.setdefault((config, name.partition(":")[0]), []).append(found)
    for (config, kind), plans in sorted(lines.items()):
        plans.sort(key=lambda plan: plan["chips"])
        chips = [plan["chips"] for plan in plans]
        style = {"marker": "o", "label": f"{config}, {kind}"}
        sent.plot(chips, [plan["sent"] / 1e6 for plan in plans], **style)
        seconds.plot(chips, [1e3 * plan["step_seconds"] for plan in plans], **style)
    for axes, label in ((sent, "MB that a chip sends in a step"), (seconds, "ms a step")):
        axes.set(xscale="log", yscale="log", xlabel="chips, as many rows on each", ylabel=label)
        ticks = sorted({plan["chips"] for plan in known.values()})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*sent.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main():
    """Compile what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--output", type=Path, default=Path("slices.json"))
    parser.add_argument("--plot", type=Path, help="picture to draw, of all plans of --output")
    args = parser.parse_args()

    from c2f_jax.config.files import load_config

    plans = []
    if args.output.exists():
        plans = [json.loads(line) for line in args.output.read_text().splitlines()]
    known = {(found["config"], found["topology"]): found for found in plans}
    wanted = [(config, name) for config in args.configs for name in args.slices]
    for config, name in tqdm([key for key in wanted if key not in known], unit="program"):
        rows = max(load_config(config).batch_size // 8, 1)
        known[config, name] = plan(config, name, rows)
        with args.output.open("a") as file:
            file.write(json.dumps(known[config, name]) + "\n")

    head = ("configuration", "slice", "chips", "batch", "GiB a chip", "TFLOP a chip")
    head += ("MB sent", "ms a step", "pairs/s", "efficiency")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for config, name in wanted:
        kind = name.partition(":")[0]
        first = next(known[key] for key in wanted if key[0] == config and key[1].startswith(kind))
        print(row(known[config, name], first))
    if args.plot:
        plot(args.plot, known)


if __name__ == "__main__":
    main()
