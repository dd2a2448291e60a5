"""Seconds of an exact search for the k nearest of a million embeddings, against other libraries.

    python benchmarks/search.py                                  # 1,000,000 x 256, k = 100
    python benchmarks/search.py --queries 1 --libraries ours numpy faiss

Libraries, each in a process of its own; they take turns, --rounds times:
  ours          c2f_jax.retrieval.ranking.coarse_top_k, gallery in host memory
  numpy         products and argpartition, block by block
  torch         a product and topk, gallery in host memory
  torch-device  the same, the gallery on the GPU
  faiss         IndexFlatIP
  usearch       exact search

Those that are not installed, and torch-device without a GPU, are left out with a line. Seconds are
from a numpy array of queries to a numpy array of rows, without building an index. Every answer is
checked against float64: "missed" is how far the worst of the k found lies below the k-th best, and
more than 1e-5 is an error. "same" is the share of the k rows that are those of float64; rounding
may exchange equals. All vectors are random and of length 1.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("ours", "numpy", "torch", "torch-device", "faiss", "usearch")
ALLOWED = 1e-5  # rounding of a sum of 256 float32 products is below a tenth of it


def unit_rows(rng, rows, dim):
    """Return (rows, dim) random float32 vectors of length 1."""
    x = rng.standard_normal((rows, dim), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact_top_k(queries, gallery, k, block=65_536):
    """Return float64 scores and rows of the k nearest, best first."""
    scores, rows = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    queries = queries.astype(np.float64)
    for start in range(0, len(gallery), block):
        found = queries @ gallery[start : start + block].astype(np.float64).T
        kept = min(k, found.shape[1])
        best = np.argpartition(-found, kept - 1, axis=1)[:, :kept]
        scores = np.append(scores, np.take_along_axis(found, best, 1), 1)
        rows = np.append(rows, best + start, 1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def numpy_top_k(queries, gallery, k, block=65_536):
    """Return the rows of the k nearest, best first."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(gallery), block):
        found = queries @ gallery[start : start + block].T
        kept = min(k, found.shape[1])
        best = np.argpartition(found, found.shape[1] - kept, axis=1)[:, -kept:]
        scores = np.append(scores, np.take_along_axis(found, best, 1), 1)
        rows = np.append(rows, best + start, 1)
    return np.take_along_axis(rows, np.argsort(-scores, axis=1)[:, :k], 1)


def build(library, gallery, k):
    """Return a function of queries (Q, D) that returns the rows of the k nearest, best first."""
    threads = len(os.sched_getaffinity(0))
    if library == "ours":
        from c2f_jax.retrieval.ranking import coarse_top_k

        return lambda queries: coarse_top_k(queries, gallery, k)[1]
    if library == "numpy":
        return lambda queries: numpy_top_k(queries, gallery, k)
    if library.startswith("torch"):
        import torch

        torch.set_num_threads(threads)
        device = "cuda" if library == "torch-device" else "cpu"
        placed = torch.from_numpy(gallery).to(device)

        def search(queries):
            scores = torch.from_numpy(queries).to(device) @ placed.T
            return scores.topk(k, dim=1).indices.cpu().numpy()

        return search
    if library == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        return lambda queries: index.search(queries, k)[1]
    from usearch.index import MetricKind, search

    def exact(queries):
        found = search(gallery, queries, k, MetricKind.IP, exact=True, threads=threads)
        return np.asarray(found.keys).reshape(len(queries), k)

    return exact


def reason_to_leave_out(library):
    """Return why a library cannot be measured here; None if it can."""
    module = library.removesuffix("-device")
    if module != "ours" and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if library == "torch-device":
        import torch

        if not torch.cuda.is_available():
            return "no GPU"
    return None


def worker(args):
    """Serve one library: each line of input is a number of queries."""
    gallery, queries = (np.load(Path(args.folder) / f"{x}.npy") for x in ("gallery", "queries"))
    search = build(args.worker, gallery, args.k)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        rows = search(queries[: int(line)])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "rows": rows.tolist()}), flush=True)


def ask(process, line=None):
    """Send a line to a worker and return its answer; None if it has died."""
    try:
        if line is not None:
            print(line, file=process.stdin, flush=True)
    except BrokenPipeError:
        return None
    return next((json.loads(text) for text in process.stdout if text.startswith("{")), None)


def measure(args, folder):
    """Return the status after printing a row for each library and number of queries."""
    rng = np.random.default_rng(0)
    gallery = unit_rows(rng, args.size, args.dim)
    queries = unit_rows(rng, max(args.queries), args.dim)
    np.save(folder / "gallery.npy", gallery)
    np.save(folder / "queries.npy", queries)
    best_scores, best_rows = exact_top_k(queries, gallery, args.k)

    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    workers, status = {}, 0
    try:
        for library in args.libraries:
            reason = reason_to_leave_out(library)
            if reason is not None:
                print(f"search {library:13} left out: {reason}")
                continue
            words = [sys.executable, __file__, f"--worker={library}", f"--folder={folder}"]
            workers[library] = subprocess.Popen(
                [*words, f"--k={args.k}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            ask(workers[library])

        form = "{:6} {:13} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9}"
        words = ("search", "library", "queries", "ms", "fastest", "slowest", "same", "missed")
        print(form.format(*words))
        for count in args.queries:
            found = {library: [ask(process, count)] for library, process in workers.items()}
            for _ in range(args.rounds):
                for library, process in workers.items():
                    found[library].append(ask(process, count))
            for library, answers in found.items():
                if None in answers:
                    print(f"search {library:13} failed, see above")
                    status = 1
                    continue
                rows = np.array(answers[-1]["rows"])
                scores = np.einsum("qd,qkd->qk", queries[:count].astype(np.float64), gallery[rows])
                distinct = all(len(set(row)) == args.k for row in rows.tolist())
                missed = (best_scores[:count] - -np.sort(-scores, axis=1)).max()
                missed = max(missed, 0.0) if distinct else np.inf
                status |= not missed <= ALLOWED
                same = np.mean(
                    [np.isin(a, b).mean() for a, b in zip(rows, best_rows, strict=False)]
                )
                seconds = [answer["seconds"] for answer in answers[1:]]  # the first compiles
                times = [statistics.median(seconds), min(seconds), max(seconds)]
                times = [f"{1e3 * x:.2f}" for x in times]
                print(form.format("", library, count, *times, f"{same:.4%}", f"{missed:.0e}"))
    finally:
        for process in workers.values():
            process.kill()
    return int(status)


def main():
    """Parse the arguments, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1_000_000, help="rows of the gallery")
    parser.add_argument("--dim", type=int, default=256, help="D")
    parser.add_argument("--k", type=int, default=100, help="rows to find for each query")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 100], help="at once")
    parser.add_argument("--rounds", type=int, default=5, help="timed searches (default: 5)")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--tiny", action="store_true", help="20,000 x 32, to see that it runs")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.tiny:
        args.size, args.dim, args.k, args.queries, args.rounds = 20_000, 32, 10, [1, 16], 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before the end"))
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
