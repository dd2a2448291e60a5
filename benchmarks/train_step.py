"""Seconds, memory and FLOPs of the whole training step, beside the same step in PyTorch.

    python benchmarks/train_step.py                          # the quickstart's model, CPU or GPU
    python benchmarks/train_step.py --setting=base --bfloat16 --batch=64 --sequence
    python benchmarks/train_step.py --setting=large --bfloat16 --variants ours ours-cudnn --remat
    python benchmarks/train_step.py --setting=base --parity  # our losses here and on the CPU

A step is all of it: momentum forward pass, SIC against batch and queue with soft targets, hard
negatives, SIM over 3 n pairs, gradients, clipping, AdamW, moving average, queue. The batch is on
the device and the queue is full. Weights are random; nothing is downloaded.

Settings:
  light  the model of configs/spoken_scenes.py, 3.6 s of speech, 64 px
  base   HuBERT base (convolutions frozen) and CLIP's ViT-B/16, both tuned, 4 s, 224 px
  large  flickr8k_audio:large: HuBERT large, frozen, read at all layers, 6.4 s; BLIP-2's 32 tokens

Variants, each a process of its own, so that its memory is its own:
  ours            jax.pmap, as `c2f train` does by default
  ours-shard_map  --config.parallel=shard_map
  ours-cudnn      --config.model.attention=cudnn: a GPU with --bfloat16
  torch           torch_step.py
  torch-compile   the same under torch.compile
  torch-graphs    the same with mode="reduce-overhead", CUDA graphs

The variants take turns: two steps that are not timed, then --steps steps without a pause, --rounds
times. What counts is the mean step of a turn; the table has median, fastest and slowest turn. With
--sequence a variant takes all its turns and ends before the next one begins, for settings of which
two do not fit into memory together. On a GPU without --bfloat16 both libraries use TF32.

"compile s" is ours: tracing and compiling, where later variants take what the first found out about
the GPU's kernels; PyTorch: the first steps without the time of later ones.
"GiB" is the peak of arrays on a GPU (with CUDA graphs, of what PyTorch has reserved), that of the
process on a CPU. FLOPs are those of the products
and convolutions of our step, each counted once, without recomputation; "peak" is the share of what
a product of large matrices of the same type reaches in this run. Parameters are those trained.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("ours", "ours-shard_map", "torch", "torch-compile")
ALL_VARIANTS = (*VARIANTS, "ours-cudnn", "torch-graphs")
BASE_OF_RATIOS = "torch-compile"

COMMON = {"alpha": 0.4, "tau": 0.07, "clip_norm": 1.0}
LIGHT = {"width": 96, "heads": 4}
HEAD = {"width": 768, "heads": 12, "mlp_ratio": 4.0}
PUBLISHED = COMMON | {
    "momentum": 0.995,
    "learning_rate": 1e-4,
    "weight_decay": 0.02,
    "b2": 0.999,
    "speech": HEAD | {"depth": 2},
    "image": HEAD | {"depth": 1},
    "multimodal": HEAD | {"depth": 4},
}
SETTINGS = {
    "light": COMMON
    | {
        "batch": 64,
        "seconds": 3.6,
        "side": 64,
        "queue": 512,
        "momentum": 0.98,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "b2": 0.98,
        "speech": LIGHT | {"depth": 4, "mlp_ratio": 4.0},
        "image": LIGHT | {"depth": 3, "mlp_ratio": 2.0},
        "multimodal": LIGHT | {"depth": 2, "mlp_ratio": 2.0},
    },
    "base": PUBLISHED | {"batch": 4, "seconds": 4.0, "side": 224, "queue": 1024},
    # No side: images are tokens of BLIP-2.
    "large": PUBLISHED | {"batch": 4, "seconds": 6.4, "side": None, "queue": 16_384},
}
TINY = {"batch": 4, "seconds": 1.0, "queue": 8}
TINY_TOWER = {"width": 64, "depth": 1, "heads": 4}

# transformers' names of the sizes.
CLIP_B_16 = {"patch_size": 16}
TINY_HUBERT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TINY_HUBERT |= {"intermediate_size": 256}


def settings_of(args):
    """Return the numbers of a setting."""
    setting = SETTINGS[args.setting]
    if args.tiny:
        setting = setting | TINY
        for part in ("speech", "image", "multimodal"):
            setting = setting | {part: setting[part] | {"depth": 1}}
    return setting | ({"batch": args.batch} if args.batch else {})


def make_batches(setting, count=2, seed=0):
    """Return numpy batches of noise; the last two rows of each show the same image."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows, samples, batches = setting["batch"], round(setting["seconds"] * 16_000), []
    for _ in range(count):
        lengths = rng.integers(samples // 2, samples + 1, rows).astype(np.int32)
        lengths[0] = samples
        waveform = 0.1 * rng.normal(size=(rows, samples)).astype(np.float32)
        waveform[np.arange(samples) >= lengths[:, None]] = 0
        if setting["side"] is None:
            image = rng.normal(size=(rows, 32, 768)).astype(np.float16)
        else:
            image = rng.integers(0, 256, (rows, setting["side"], setting["side"], 3), np.uint8)
        ids = rng.choice(100_000, rows, replace=False).astype(np.int32)
        ids[-1] = ids[-2]
        batch = {"waveform": waveform, "speech_lengths": lengths, "image_id": ids}
        batches.append(batch | {"image" if image.ndim == 4 else "image_tokens": image})
    return batches


def our_encoders(args, setting):
    """Return speech, image and multimodal encoder as ``create_model`` takes them."""
    from encoders import TOWERS

    speech, image = dict(setting["speech"]), dict(setting["image"])
    if args.setting == "light":
        speech, image = speech | {"name": "log_mel"}, image | {"name": "vit", "conv_blocks": 1}
        return speech, image, setting["multimodal"]
    tiny = TINY_TOWER if args.tiny else {}
    tower = TOWERS["hubert_base" if args.setting == "base" else "hubert_large"] | tiny
    if args.setting == "base":
        speech |= {"name": "published", "tower": tower, "frozen": "conv"}
        image |= {"name": "published", "tower": TOWERS["vit_b_16"] | tiny, "frozen": "none"}
    else:
        speech |= {"name": "published", "tower": tower, "frozen": "tower"}
        speech |= {"layer": "weighted_sum"}
        image |= {"name": "tokens"}
    return speech, image, setting["multimodal"]


class Ours:
    """Our step as ``c2f train`` runs it: a donated state, ``DataParallel``."""

    def __init__(self, args, setting, variant):
        import jax
        import jax.numpy as jnp

        from c2f_jax.objectives import EmbeddingQueue
        from c2f_jax.training.parallel import DataParallel
        from c2f_jax.training.train_state import create_train_state
        from c2f_jax.training.train_step import train_step

        self.jax, self.args, self.setting = jax, args, setting
        if args.parity:
            jax.config.update("jax_default_matmul_precision", "highest")
        attention = "cudnn" if variant == "ours-cudnn" else "xla"
        kinds = self._kinds(attention=attention, remat=args.remat)
        self.parallel = DataParallel("shard_map" if variant == "ours-shard_map" else "pmap")
        step = self.parallel.compile_step(
            lambda state, batch, axis_name: train_step(state, batch, axis_name=axis_name, **kinds)
        )

        batch = make_batches(setting, count=1)[0]
        state = create_train_state(
            kinds["model"],
            kinds["optimizer"],
            batch,
            seed=0,
            queue_size=setting["queue"],
            token_queue_size=0,
        )
        # A full queue, so that the first step does the work of a late one.
        size = setting["queue"]
        rows = jax.random.normal(jax.random.key(1), (2, size, 256))
        rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
        entries = {"speech": rows[0], "image": rows[1], "id": jnp.arange(size) + 1_000_000}
        entries = {name: entries[name].astype(x.dtype) for name, x in state.queue.entries.items()}
        queue = EmbeddingQueue(entries, jnp.zeros((), jnp.int32), jnp.asarray(size, jnp.int32))
        self.state = self.parallel.place_state(state.replace(queue=queue))
        self.parameters = sum(x.size for x in jax.tree.leaves(state.params))
        del state, rows, entries, queue

        placed = self.parallel.place_batch(batch)
        began = time.perf_counter()
        self.compiled = step.lower(self.state, placed).compile()
        self.compile_seconds = time.perf_counter() - began

    def _kinds(self, attention="xla", remat=False):
        from c2f_jax.models.factory import create_model
        from c2f_jax.training.method import MethodConfig
        from c2f_jax.training.optimizer import OptimizerConfig, create_optimizer

        setting = self.setting
        model = create_model(
            *our_encoders(self.args, setting),
            dtype="bfloat16" if self.args.bfloat16 else "float32",
            attention=attention,
            remat=remat,
        )
        method = MethodConfig(
            momentum=setting["momentum"], alpha=setting["alpha"], alpha_ramp_steps=0
        )
        names = ("learning_rate", "weight_decay", "b2")
        config = OptimizerConfig(warmup_steps=0, **{name: setting[name] for name in names})
        return {"model": model, "optimizer": create_optimizer(config, 10**6), "method": method}

    def place(self, batch):
        return self.parallel.place_batch(batch)

    def step(self, batch):
        self.state, metrics = self.compiled(self.state, batch)
        return metrics

    def wait(self, outputs):
        self.jax.block_until_ready((self.state, outputs))

    def losses(self, metrics):
        return [float(metrics[name].compute()) for name in ("sic_loss", "sim_loss")]

    def memory(self):
        stats = self.jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 2**30 if stats else None

    def rest(self):
        """What a turn leaves to the others: nothing, XLA keeps its memory."""

    def tflop(self, batch):
        """TFLOP of a step without recomputation."""
        from c2f_jax.hardware.programs import count_operations
        from c2f_jax.training.train_step import train_step

        kinds, tree = self._kinds(), (self.state, batch)
        shapes = self.jax.tree.map(lambda x: self.jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        written = self.jax.make_jaxpr(lambda state, batch: train_step(state, batch, **kinds))
        return count_operations(written(*shapes)).flops / 1e12

    def peak(self):
        """TFLOP/s of a product of large matrices."""
        jax = self.jax
        on_cpu = jax.default_backend() == "cpu"
        size = 2048 if on_cpu else 8192
        dtype = jax.numpy.bfloat16 if self.args.bfloat16 else jax.numpy.float32
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        seconds, count = [], 2 if on_cpu else 20
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(count):
                last = product(a)
            last.block_until_ready()
            seconds.append((time.perf_counter() - began) / count)
        return 2 * size**3 / min(seconds) / 1e12


class Torch:
    """The step of torch_step.py."""

    def __init__(self, args, setting, variant):
        import torch
        import torch_step

        self.torch, self.has_graphs = torch, variant == "torch-graphs"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        tiny = TINY_HUBERT if args.tiny else {}
        if args.setting == "light":
            speech = torch_step.LightSpeech(**setting["speech"])
            image = torch_step.LightImage(**setting["image"], side=setting["side"])
        elif args.setting == "base":
            speech = torch_step.HubertSpeech(tiny, "conv", setting["speech"])
            image = torch_step.ViTImage(CLIP_B_16 | tiny, setting["image"])
        else:
            from c2f_jax.pretrained.stand_ins import HUBERT_LARGE

            sizes = {name: value for name, value in HUBERT_LARGE.items() if name != "model_type"}
            speech = torch_step.HubertSpeech(sizes | tiny, "tower", setting["speech"])
            image = torch_step.TokenHead(768, **setting["image"], positions=False)
        width = setting["speech"]["width"]
        self.model = torch_step.TorchStep(
            torch_step.Encoders(speech, image, width, 256),
            torch_step.Matcher(width, **setting["multimodal"]),
            setting,
            self.device,
            args.bfloat16,
            {"torch-compile": "default", "torch-graphs": "reduce-overhead"}.get(variant),
        )
        self.parameters, self.step = self.model.parameter_count(), self.model.step

        # The first step compiles; what it costs beyond a later one is the compiler's.
        placed, seconds = self.place(make_batches(setting, count=1)[0]), []
        steps = {"torch": 0, "torch-compile": 2, "torch-graphs": 4}[variant]
        for _ in range(steps):  # graphs are captured in the second and third
            began = time.perf_counter()
            self.wait(self.step(placed))
            seconds.append(time.perf_counter() - began)
        self.compile_seconds = sum(seconds) - steps * min(seconds, default=0.0)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.rest()

    def place(self, batch):
        return self.model.place(batch)

    def losses(self, outputs):
        return [float(x) for x in outputs]

    def wait(self, outputs):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def memory(self):
        if self.device == "cuda":
            cuda = self.torch.cuda
            # Arrays inside of CUDA graphs are not counted as allocated.
            peak = cuda.max_memory_reserved() if self.has_graphs else cuda.max_memory_allocated()
            return peak / 2**30
        return None

    def rest(self):
        """Leave memory that is not in use to the others."""
        if self.device == "cuda":
            self.torch.cuda.empty_cache()


def worker(args):
    """Serve one variant: a line of input is a number of steps, "tflop" or "peak"."""
    setting = settings_of(args)
    side = (Ours if args.worker.startswith("ours") else Torch)(args, setting, args.worker)
    batches = make_batches(setting)
    placed = [side.place(batch) for batch in batches]
    print(json.dumps({"compile": side.compile_seconds, "parameters": side.parameters}), flush=True)
    done = 0
    for line in map(str.strip, sys.stdin):
        if line in ("tflop", "peak"):
            value = side.tflop(batches[0]) if line == "tflop" else side.peak()
            print(json.dumps({line: value}), flush=True)
            continue
        kept = []
        for _ in range(0 if args.parity else 2):
            kept.append(side.step(placed[0]))
            side.wait(kept)
        began = time.perf_counter()
        for _ in range(int(line)):
            kept.append(side.step(placed[done % len(placed)]))
            done += 1
        side.wait(kept)
        seconds = (time.perf_counter() - began) / int(line)
        memory = side.memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        losses = [side.losses(outputs) for outputs in kept]
        del kept
        side.rest()
        print(json.dumps({"seconds": seconds, "memory": memory, "losses": losses}), flush=True)


class Variant:
    """The process of a variant."""

    def __init__(self, args, name, kernels=None, cpu=False):
        self.name, self.ready, self.turns, self.failed = name, None, [], False
        words = [sys.executable, __file__, f"--worker={name}", f"--setting={args.setting}"]
        words += [f"--batch={args.batch}"] if args.batch else []
        flags = {"--bfloat16": args.bfloat16, "--remat": args.remat, "--tiny": args.tiny}
        flags |= {"--parity": args.parity, "--cpu": args.cpu or cpu}
        words += [flag for flag, given in flags.items() if given]
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # Several processes share a GPU, and each may need most of it when its turn has come.
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        if args.cpu or cpu:
            environment["JAX_PLATFORMS"] = "cpu"
        elif kernels is not None:
            # Of jax's cache the choice of kernels alone: programs compile anew.
            environment["JAX_COMPILATION_CACHE_DIR"] = kernels
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1000000"
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self):
        """Return the next answer; None if the process has died."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.failed = True
        return None

    def wait_ready(self):
        """Wait until it has compiled."""
        self.ready = self.read()
        seconds = "failed" if self.failed else f"ready, compiled in {self.ready['compile']:.1f} s"
        print(f"{self.name}: {seconds}", file=sys.stderr, flush=True)

    def ask(self, what):
        """Return the answer to a line; None if the process has died."""
        if self.failed:
            return None
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self.process.stdin, flush=True)
        return self.read()

    def turn(self, steps):
        """Take a turn."""
        answer = self.ask(steps)
        if answer is not None:
            self.turns.append(answer)
            print(f"{self.name}: {1e3 * answer['seconds']:.2f} ms", file=sys.stderr, flush=True)

    def close(self):
        """End the process, at its next line of input."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def compare(args):
    """Measure all variants and print the table, also when told to stop before the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before the end"))
    facts, variants = {}, []
    try:
        with tempfile.TemporaryDirectory() as kernels:
            measure(args, variants, facts, kernels)
    finally:
        for variant in variants:
            variant.process.kill()
        print_table(args, variants, facts)
    return int(any(variant.failed for variant in variants))


def measure(args, variants, facts, kernels):
    """Compile the variants and take their turns.

    XLA chooses kernels by their measured time, so that ours compile one after the other; PyTorch
    compiles beside them where there are processors for it.
    """
    beside = len(os.sched_getaffinity(0)) >= 8
    names = sorted(args.variants, key=lambda name: name.startswith("ours"))
    for name in names:
        variants.append(Variant(args, name, kernels))
        if name.startswith("ours") or not beside:
            variants[-1].wait_ready()
    variants.sort(key=lambda variant: args.variants.index(variant.name))
    for variant in variants:
        if variant.ready is None and not variant.failed:
            variant.wait_ready()

    def learn(variant, fact):
        if variant.name.startswith("ours") and fact not in facts:
            facts.update(variant.ask(fact) or {})

    def finish(variant):
        learn(variant, "peak")  # the last thing, since its matrices take memory too
        variant.close()

    for variant in variants:
        learn(variant, "tflop")

    if args.sequence:
        for variant in variants:
            for _ in range(args.rounds):
                variant.turn(args.steps)
            finish(variant)
    else:
        for _ in range(args.rounds):
            for variant in variants:
                variant.turn(args.steps)
        for variant in variants:
            finish(variant)


def print_table(args, variants, facts):
    """Print a row for each variant, and append it to a file."""
    setting = settings_of(args)
    named = {variant.name: variant for variant in variants if variant.turns}
    medians = {n: statistics.median(t["seconds"] for t in v.turns) for n, v in named.items()}
    base, tflop, peak = medians.get(BASE_OF_RATIOS), facts.get("tflop"), facts.get("peak")
    words = ("setting", "type", "batch", "variant", "ms", "fastest", "slowest", "speed")
    words += ("compile s", "GiB", "TFLOP/s", "peak", "parameters")
    form = "{:6} {:9} {:>5} {:14}" + " {:>9}" * 9
    print(form.format(*words))
    kind = ("bfloat16" if args.bfloat16 else "float32", "+remat" if args.remat else "")
    for name, variant in named.items():
        seconds = [turn["seconds"] for turn in variant.turns]
        median, memory = medians[name], max(turn["memory"] for turn in variant.turns)
        row = {
            "setting": args.setting,
            "type": kind[0],
            "batch": setting["batch"],
            "variant": name + (kind[1] if name.startswith("ours") else ""),
            "ms": f"{1e3 * median:.2f}",
            "fastest": f"{1e3 * min(seconds):.2f}",
            "slowest": f"{1e3 * max(seconds):.2f}",
            "speed": f"{base / median:.2f}" if base else "",
            "compile s": f"{variant.ready['compile']:.1f}",
            "GiB": f"{memory:.2f}",
            "TFLOP/s": f"{tflop / median:.2f}" if tflop else "",
            "peak": f"{tflop / median / peak:.1%}" if tflop and peak else "",
            "parameters": variant.ready["parameters"],
        }
        print(form.format(*row.values()))
        if args.json:
            row |= {"turns": seconds, "losses": variant.turns[-1]["losses"][-1]} | facts
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    for name in args.variants:
        if name not in named:
            print(f"{args.setting:6} {kind[0]:9} {setting['batch']:>5} {name:14} no result")
    if peak:
        print(f"a step has {tflop:.3f} TFLOP; peak, {kind[0]}: {peak:.1f} TFLOP/s")
    sys.stdout.flush()


def parity(args):
    """Compare our losses on this device with those on the CPU; the status is 1 if they differ."""
    sides = Variant(args, "ours"), Variant(args, "ours", cpu=True)
    for side in sides:
        side.wait_ready()
        side.turn(args.steps)
        if side.failed:
            return 1
    for side in sides:
        side.close()
    status = 0
    print(f"{args.setting}: SIC and SIM, float32, here and on the CPU")
    answers = [side.turns[0]["losses"] for side in sides]
    for number, (here, cpu) in enumerate(zip(*answers, strict=True)):
        error = max(abs(a - b) / abs(b) for a, b in zip(here, cpu, strict=True))
        allowed = args.tolerance if number == 0 else args.later_tolerance
        status |= not error <= allowed
        pairs = " ".join(f"{a:.6f} / {b:.6f}" for a, b in zip(here, cpu, strict=True))
        print(f"step {number}: {pairs}, relative difference {error:.1e}, allowed {allowed:g}")
    return int(status)


def main():
    """Parse the arguments, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="light")
    parser.add_argument(
        "--variants", nargs="+", choices=ALL_VARIANTS, default=list(VARIANTS), metavar="VARIANT"
    )
    parser.add_argument("--batch", type=int, help="rows (default: those of the setting)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of a variant (default: 5)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--remat", action="store_true", help="ours recomputes activations")
    parser.add_argument("--sequence", action="store_true", help="one variant after the other")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", help="file that gets a line of JSON for each variant")
    parser.add_argument("--parity", action="store_true", help="compare losses with the CPU's")
    parser.add_argument("--tolerance", type=float, default=5e-5, help="of the first step, relative")
    parser.add_argument("--later-tolerance", type=float, default=1e-3, help="of later steps")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    return parity(args) if args.parity else compare(args)


if __name__ == "__main__":
    sys.exit(main())
