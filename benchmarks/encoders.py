"""Time of published encoders, forward and backward, against PyTorch on the same machine.

    python benchmarks/encoders.py           # CPU: HuBERT base and ViT-B/16 against transformers
    python benchmarks/encoders.py --large   # GPU, bf16: HuBERT large, ViT-L/14, ViT-g/14

Weights are random. On a CPU: float32, 8 utterances of 4 s and 16 images of 224 x 224, PyTorch eager
and torch.compile, each library in its own process on the same cores. All start from the waveform or
the uint8 pixels and end with the last layer norm, without dropout; ours also masks by the lengths.

Each measurement is one line of JSON: the median of ``--repeats`` runs after one to compile, and the
fastest and slowest; on a GPU also the share of the peak. FLOPs are XLA's count of the program
before compilation, which leaves out cuDNN's attention.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

# Dense bf16, from the data sheets.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
CPU_CASES = ("hubert_base", "vit_b_16")
GPU_CASES = ("hubert_large", "vit_l_14", "vit_g_14")
HUBERT_LARGE = {
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "conv_layer_norm": True,
    "conv_bias": True,
    "pre_norm": True,
    "normalize": True,
}
TOWERS = {
    "hubert_base": {"name": "wav2vec2"},
    "hubert_large": {"name": "wav2vec2"} | HUBERT_LARGE,
    "vit_b_16": {"name": "vision_transformer", "patch": 16},
    "vit_l_14": {
        "name": "vision_transformer",
        "patch": 14,
        "width": 1024,
        "depth": 24,
        "heads": 16,
    },
    "vit_g_14": {
        "name": "vision_transformer",
        "patch": 14,
        "width": 1408,
        "depth": 39,
        "heads": 16,
        "mlp_ratio": 6144 / 1408,
        "patch_bias": True,
        "input_norm": False,
        "activation": "gelu",
    },
}


def inputs(case, batch):
    """Return noise as numpy inputs: 4 s of sound, or images."""
    import numpy as np

    rng = np.random.default_rng(0)
    if case.startswith("hubert"):
        return rng.normal(size=(batch, 64_000)).astype(np.float32), np.full(
            (batch,), 64_000, np.int32
        )
    return (rng.integers(0, 256, (batch, 224, 224, 3)).astype(np.uint8),)


def timed(run, repeats):
    """Return the seconds of each of ``repeats`` runs after a first one."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure_jax(case, batch, repeats, dtype, attention):
    """Yield (what, seconds, FLOPs, device) for the forward pass and for forward + backward."""
    import jax
    import jax.numpy as jnp

    from c2f_jax.models.factory import create_tower

    tower = create_tower(TOWERS[case], dtype=jnp.dtype(dtype), attention=attention)
    given = jax.device_put(inputs(case, batch))
    params = jax.jit(tower.init)(jax.random.key(0), *given)

    def loss(params, *given):
        return jnp.sum(jnp.square(tower.apply(params, *given)[0].astype(jnp.float32)))

    for what, function in (
        ("forward", lambda p, *x: tower.apply(p, *x)[0]),
        ("forward+backward", jax.grad(loss)),
    ):
        lowered = jax.jit(function).lower(params, *given)
        flops, compiled = lowered.cost_analysis()["flops"], lowered.compile()
        run = lambda compiled=compiled: jax.block_until_ready(compiled(params, *given))  # noqa: E731
        yield what, timed(run, repeats), flops, jax.devices()[0].device_kind


def measure_torch(case, batch, repeats, compiled):
    """Yield the same for the model of transformers on a CPU, same inputs and same last layer."""
    import torch
    import transformers

    from c2f_jax.models.networks.vision_transformer import CLIP_MEAN, CLIP_STD

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    given = torch.from_numpy(inputs(case, batch)[0])
    if case == "hubert_base":
        model = transformers.HubertModel(transformers.HubertConfig())
        encode = lambda wave: model(wave).last_hidden_state  # noqa: E731
    else:
        config = transformers.CLIPVisionConfig(patch_size=16)
        model = transformers.CLIPVisionModelWithProjection(config).vision_model
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))

        def encode(image):
            x = (image.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
            return model.post_layernorm(model(x).last_hidden_state)

    model.eval()
    call = torch.compile(encode) if compiled else encode

    def forward():
        with torch.no_grad():
            call(given)

    def backward():
        model.zero_grad()
        call(given).square().sum().backward()

    yield "forward", timed(forward, repeats), None, "CPU"
    yield "forward+backward", timed(backward, repeats), None, "CPU"


def main():
    """Measure the encoders; print one line of JSON for each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--large", action="store_true", help="measure the large networks in bf16, on an accelerator"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(TOWERS), help="measure only these networks"
    )
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("jax", "torch", "torch.compile"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = args.cases or (GPU_CASES if args.large else CPU_CASES)
    if args.only is None and not args.large:
        for case in cases:
            for library in ("jax", "torch", "torch.compile"):
                environment = os.environ | {
                    "OMP_NUM_THREADS": str(args.threads),
                    "JAX_PLATFORMS": "cpu",
                }
                command = [
                    sys.executable,
                    __file__,
                    f"--only={library}",
                    f"--repeats={args.repeats}",
                    "--cases",
                    case,
                ]
                subprocess.run([*command, f"--threads={args.threads}"], env=environment, check=True)
        return
    if args.only:  # set before either library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    for case in cases:
        batch = {"hubert": 8, "vit": 16}[case.partition("_")[0]] * (4 if args.large else 1)
        dtype = "bfloat16" if args.large else "float32"
        if args.only in (None, "jax"):
            measured = measure_jax(case, batch, args.repeats, dtype, args.attention)
        else:
            measured = measure_torch(case, batch, args.repeats, args.only == "torch.compile")
        for what, seconds, flops, device in measured:
            line = {
                "case": case,
                "library": args.only or "jax",
                "what": what,
                "batch": batch,
                "dtype": dtype,
            }
            line |= {"device": device, "seconds": round(statistics.median(seconds), 4)}
            line |= {"fastest": round(min(seconds), 4), "slowest": round(max(seconds), 4)}
            if flops:
                line["tflops_per_second"] = round(flops / statistics.median(seconds) / 1e12, 3)
                peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
                line |= (
                    {"share_of_peak": round(line["tflops_per_second"] / peak, 3)} if peak else {}
                )
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
