"""Pictures a second from a folder of JPEGs to an index, beside a torch DataLoader and PyTorch.

    python benchmarks/index.py                     # the quickstart's image encoder, 64 px
    python benchmarks/index.py --setting base      # ViT-B/16, 224 px
    python benchmarks/index.py --folder path/to/pictures

Weights are random. Without a folder there are --images pictures of 500 x 375.

  ours     c2f_jax.index.build_index: decodes, looks for oddities, hashes the files, encodes,
           and writes embeddings, tokens, thumbnails and checksums
  pytorch  what a script does: a DataLoader with as many workers as cores, Image.open, convert,
           resize; the same encoder; np.save of embeddings and float16 tokens

Each has a process of its own; they take turns, --rounds times, after one that compiles. Seconds are
from the list of files to files on disk, without imports. "ratio" is the median over the rounds.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data import make_files
from train_step import SETTINGS, our_encoders, settings_of

ROOT = Path(__file__).resolve().parents[1]
BATCH = 100


def ours(args, files):
    """Return a function that builds an index in a folder."""
    import jax
    from ml_collections import ConfigDict

    from c2f_jax.config.experiment import create_experiment, example_batch
    from c2f_jax.config.files import load_config
    from c2f_jax.index import build_index
    from c2f_jax.inference import TrainedModel
    from c2f_jax.models.factory import create_model
    from c2f_jax.training.parallel import replicate

    del files  # it lists them itself
    setting = settings_of(args)
    config = load_config("spoken_scenes")
    config.data.image_size, config.eval.batch_size = setting["side"], BATCH
    light = {"width": setting["image"]["width"], "heads": setting["image"]["heads"]}
    config.model.speech = ConfigDict({"name": "log_mel", "depth": 1} | light)
    config.model.image = ConfigDict({"name": "vit"} | light)
    config.model.multimodal = ConfigDict(dict(setting["multimodal"]))
    experiment = create_experiment(config)
    _, image, multimodal = our_encoders(args, setting)
    speech = {"name": "log_mel", "depth": 1} | light
    # A network without published weights is no configuration.
    object.__setattr__(experiment, "model", create_model(speech, image, multimodal))
    variables = jax.jit(experiment.model.init)(jax.random.key(0), example_batch(experiment.data))
    params = replicate(variables["params"])
    count = sum(leaf.size for leaf in jax.tree.leaves(params["image_encoder"]))
    model = TrainedModel(experiment, params, 0, args.work, {})
    return count, lambda output: build_index(model, output, args.folder)


def pytorch(args, files):
    """Return a function that writes embeddings and tokens to a folder."""
    import torch
    import torch_step
    from PIL import Image

    setting, threads = settings_of(args), len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    if args.setting == "light":
        network = torch_step.LightImage(**setting["image"], side=setting["side"])
    else:
        network = torch_step.ViTImage(torch_step_sizes(args), setting["image"])
    projection = torch.nn.Linear(setting["image"]["width"], 256)
    side = setting["side"]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, number):
            image = Image.open(files[number]).convert("RGB")
            return torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))

    @torch.inference_mode()
    def build(output):
        batches = torch.utils.data.DataLoader(Pictures(), BATCH, num_workers=threads)
        embeddings, tokens = [], []
        for batch in batches:
            encoded = network(batch)
            embeddings.append(torch.nn.functional.normalize(projection(encoded[:, 0]), dim=-1))
            tokens.append(encoded.half())
        output.mkdir()
        np.save(output / "embeddings.npy", torch.cat(embeddings).numpy())
        np.save(output / "tokens.npy", torch.cat(tokens).numpy())

    return sum(parameter.numel() for parameter in network.parameters()), build


def torch_step_sizes(args):
    """Return transformers' sizes of the network."""
    from train_step import CLIP_B_16, TINY_HUBERT

    return CLIP_B_16 | (TINY_HUBERT if args.tiny else {})


LIBRARIES = {"ours": ours, "pytorch": pytorch}


def worker(args):
    """Serve one library: each line of input is one build."""
    files = sorted(map(str, Path(args.folder).glob("*.jpg")))
    count, build = LIBRARIES[args.worker](args, files)
    print(json.dumps({"parameters": count}), flush=True)
    for number, _ in enumerate(sys.stdin):
        output = Path(args.work) / f"{args.worker}-{number}"
        began = time.perf_counter()
        build(output)
        seconds = time.perf_counter() - began
        shutil.rmtree(output)
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        answer = {"seconds": seconds, "mib": int(peak[1]) / 1024, "items": len(files)}
        print(json.dumps(answer), flush=True)


def ask(process):
    """Return the next answer of a worker."""
    found = next((json.loads(line) for line in process.stdout if line.startswith("{")), None)
    return found or sys.exit("a worker failed, see above")


def compare(args):
    """Let the libraries take turns, and print a line for each."""
    words = [sys.executable, __file__, *sys.argv[1:]]
    words += [f"--folder={args.folder}", f"--work={args.work}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    workers, found = {}, {name: [] for name in LIBRARIES}
    try:
        for name in LIBRARIES:
            workers[name] = subprocess.Popen(
                [*words, f"--worker={name}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            count = ask(workers[name])["parameters"]
            print(f"{name}: {count:,} parameters of the image encoder", flush=True)
        for _ in range(args.rounds + 1):
            for name, process in workers.items():
                print(file=process.stdin, flush=True)
                found[name].append(ask(process))
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    rates = {
        name: [one["items"] / one["seconds"] for one in answers[1:]]
        for name, answers in found.items()
    }
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["pytorch"], strict=True))
        print(
            f"{name:8} {statistics.median(values):8.1f} pictures/s  ratio {ratio:5.2f}  "
            f"{found[name][-1]['mib']:6.0f} MiB at most in the process that encodes"
        )


def main():
    """Parse the arguments, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=[s for s in SETTINGS if s != "large"], default="light")
    parser.add_argument("--images", type=int, default=2000, help="pictures to make")
    parser.add_argument("--folder", help="pictures (.jpg) to use instead")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="a few pictures, to see that it runs")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.tiny:
        args.images, args.rounds = 30, 1
    with tempfile.TemporaryDirectory() as work:
        args.work = work
        if not args.folder:
            args.folder = str(Path(work) / "pictures")
            Path(args.folder).mkdir()
            make_files(Path(args.folder), args.images, captions=0)
        return compare(args)


if __name__ == "__main__":
    sys.exit(main())
