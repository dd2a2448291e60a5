"""Search for the k nearest of up to a million embeddings, beside other libraries.

    python benchmarks/search.py                                  # 1,000,000 x 256, k = 100
    python benchmarks/search.py --queries 1 --libraries ours numpy faiss
    python benchmarks/search.py --sizes 1000 10000 100000 1000000 --plot search.png

Libraries, each in a process of its own; they take turns, --rounds times:
  ours              c2f_jax.retrieval.ranking.top_k_of_blocks, gallery in an array
  ours-index        an index in a folder, memory-mapped
  ours-table        an index in a table of LanceDB, exact
  ours-device       c2f_jax.retrieval.device_search, gallery on the accelerators
  ours-approximate  an index in a table of LanceDB, approximate
  numpy             products and argpartition, block by block
  torch             a product and topk, gallery in host memory
  torch-device      the same, the gallery on the GPU
  faiss             IndexFlatIP
  usearch           exact search
  lance             LanceDB's own exact search, without the index

Those that are not installed, and those of a device without one, are left out with a line. Seconds
are from a numpy array of queries to a numpy array of rows, without building an index. "ratio" is to
numpy: the median over the rounds. "recall" is the share of the k rows that are those of float64;
in exact search rounding may exchange equals. "missed" is how far the worst of the k found lies
below the k-th best: more than 1e-5 is an error, but in approximate search. "MiB" is the peak of the
process with the gallery, mapped files included. Embeddings are of length 1, in 2,000 clusters of 32
dimensions with noise; queries are items with noise of half their length.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OURS = ("ours", "ours-index", "ours-table", "ours-device", "ours-approximate")
LIBRARIES = (*OURS, "numpy", "torch", "torch-device", "faiss", "usearch", "lance")
MODULES = {"ours-table": "lancedb", "ours-approximate": "lancedb", "lance": "lancedb"}
CHUNK = 8192  # rows of a part of an index
ALLOWED = 1e-5  # rounding of a sum of 256 float32 products is below a tenth of it


def unit(x):
    """Return rows divided by their length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_data(rows, queries, dim):
    """Return a gallery (rows, dim) and queries (queries, dim), float32."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    centers, plane = 0.7 * normal(2000, dim), normal(32, dim) / 32**0.5
    gallery = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 50_000):
        count = min(50_000, rows - start)
        noise = normal(count, 32) @ plane + 0.3 * normal(count, dim)
        gallery[start : start + count] = unit(centers[rng.integers(0, 2000, count)] + noise)
    asked = gallery[rng.integers(0, rows, queries)]
    return gallery, unit(asked + 0.5 * unit(normal(queries, dim)))


def make_index(folder, gallery, store):
    """Write an index of items that have an embedding alone."""
    from c2f_jax.galleries.gallery_index import About
    from c2f_jax.galleries.item import EncodedItems, Item
    from c2f_jax.galleries.stores import create_index

    about = About("image", "random", None, "none", "none", {}, gallery.shape[1], 1, 1, CHUNK)
    index = create_index(folder, about, store)
    for start in range(0, len(gallery), CHUNK):
        part = gallery[start : start + CHUNK]
        items = [Item(str(start + row), [[], ""]) for row in range(len(part))]
        no_tokens = index.nothing().tokens, np.zeros(len(part), np.int32)
        index.add(items, EncodedItems([b""] * len(part), part, *no_tokens), [])
    if store == "lance":
        began = time.perf_counter()
        index.build_approximate()
        print(f"partitions of {len(gallery):,} rows: {time.perf_counter() - began:.0f} s")


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


def build(library, folder, k):
    """Return a function of queries (Q, D) that returns the rows of the k nearest, best first."""
    threads = len(os.sched_getaffinity(0))
    if library in ("ours-index", "ours-table", "ours-approximate"):
        from c2f_jax.galleries.stores import open_index

        index = open_index(folder / ("folder" if library == "ours-index" else "lance"))
        approximate = library == "ours-approximate"
        return lambda queries: index.search(queries, k, approximate=approximate)[1]
    if library == "lance":
        import lancedb

        table = lancedb.connect(str(folder / "lance")).open_table("rows")

        def nearest(query):
            ask = table.search(query, vector_column_name="embedding").bypass_vector_index()
            ask = ask.distance_type("dot").limit(k).select(["row", "_distance"])
            return ask.to_arrow()["row"].to_numpy()

        return lambda queries: np.stack(list(map(nearest, queries)))
    gallery = np.load(folder / "gallery.npy")
    if library == "ours":
        from c2f_jax.retrieval.ranking import top_k_of_blocks

        block = np.arange(len(gallery)), gallery, np.ones(len(gallery), bool)
        return lambda queries: top_k_of_blocks(queries, [block], k)[1]
    if library == "ours-device":
        from c2f_jax.retrieval.device_search import DeviceGallery

        block = np.arange(len(gallery)), gallery, np.ones(len(gallery), bool)
        resident = DeviceGallery([block], *gallery.shape)
        return lambda queries: resident.top_k(queries, k)[1]
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
    module = MODULES.get(library, library.removesuffix("-device"))
    if not module.startswith("ours") and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if library == "torch-device":
        import torch

        if not torch.cuda.is_available():
            return "no GPU"
    if library == "ours-device":
        import jax

        if jax.default_backend() == "cpu":
            return "no accelerator"
    return None


def worker(args):
    """Serve one library: each line of input is a number of queries."""
    folder = Path(args.folder)
    queries = np.load(folder / "queries.npy")
    search = build(args.worker, folder, args.k)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        rows = search(queries[: int(line)])
        seconds = time.perf_counter() - began
        # getrusage would count the process that started this one.
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        mib = int(peak[1]) / 1024
        answer = {"seconds": seconds, "rows": rows.tolist(), "mib": mib}
        print(json.dumps(answer), flush=True)


def ask(process, line=None):
    """Send a line to a worker and return its answer; None if it has died."""
    try:
        if line is not None:
            print(line, file=process.stdin, flush=True)
    except BrokenPipeError:
        return None
    return next((json.loads(text) for text in process.stdout if text.startswith("{")), None)


def start(args, folder):
    """Start a process for each library that there is."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    workers = {}
    for library in args.libraries:
        reason = reason_to_leave_out(library)
        if reason is not None:
            print(f"search {library:16} left out: {reason}")
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
    return workers


def check(answers, queries, gallery, best, k):
    """Return the recall of the last answers, and how far below the best they are."""
    best_scores, best_rows = (part[: len(queries)] for part in best)
    rows = np.array(answers[-1]["rows"])
    scores = np.einsum("qd,qkd->qk", queries.astype(np.float64), gallery[rows])
    distinct = all(len(set(row)) == k for row in rows.tolist())
    missed = (best_scores - -np.sort(-scores, axis=1)).max()
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(rows, best_rows, strict=True)])
    return recall, max(missed, 0.0) if distinct else np.inf


def measure(args, size, folder):
    """Print a row for each library and number of queries of a gallery.

    Returns the status and the milliseconds of each, by (library, queries).
    """
    gallery, queries = make_data(size, max(args.queries), args.dim)
    folder.mkdir(exist_ok=True)
    np.save(folder / "gallery.npy", gallery)
    np.save(folder / "queries.npy", queries)
    best, k = exact_top_k(queries, gallery, args.k), min(args.k, size)
    sys.path.insert(0, str(ROOT))
    if "ours-index" in args.libraries:
        make_index(folder / "folder", gallery, "folder")
    wanted = [name for name in args.libraries if name in MODULES]
    if wanted and reason_to_leave_out(wanted[0]) is None:
        make_index(folder / "lance", gallery, "lance")

    form = "{:>9} {:16} {:>7} {:>9} {:>9} {:>9} {:>6} {:>6} {:>9} {:>7}"
    words = ("library", "queries", "ms", "fastest", "slowest", "ratio", "MiB", "recall", "missed")
    status, milliseconds, workers = 0, {}, {}
    try:
        workers = start(args, folder)
        print(form.format("rows", *words), flush=True)
        for count in args.queries:
            found = {library: [ask(process, count)] for library, process in workers.items()}
            for _ in range(args.rounds):
                for library, process in workers.items():
                    found[library].append(ask(process, count))
            for library, answers in found.items():
                if None in answers:
                    print(f"search {library:16} failed, see above")
                    status = 1
                    continue
                recall, missed = check(answers, queries[:count], gallery, best, k)
                status |= not missed <= ALLOWED and library != "ours-approximate"
                seconds = [answer["seconds"] for answer in answers[1:]]  # the first compiles
                times = [1e3 * x for x in (statistics.median(seconds), min(seconds), max(seconds))]
                milliseconds[library, count] = times[0]
                ratio = "-"
                if None not in found.get("numpy", [None]):
                    rounds = zip(seconds, found["numpy"][1:], strict=True)
                    ratio = f"{statistics.median(a / b['seconds'] for a, b in rounds):.2f}"
                times = [f"{x:.2f}" for x in times]
                cells = (
                    *times,
                    ratio,
                    f"{answers[-1]['mib']:.0f}",
                    f"{recall:.3%}",
                    f"{missed:.0e}",
                )
                print(form.format(size, library, count, *cells), flush=True)
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return int(status), milliseconds


def plot(found, path):
    """Draw milliseconds against the size of the gallery; found is size -> (library, queries)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = sorted(found)
    counts = sorted({count for _, count in found[sizes[0]]})
    figure, panels = plt.subplots(1, len(counts), figsize=(4.2 * len(counts), 3.4), squeeze=False)
    for panel, count in zip(panels[0], counts, strict=True):
        for library in sorted({library for library, _ in found[sizes[0]]}):
            times = [found[size].get((library, count), np.nan) for size in sizes]
            style = "o-" if library.startswith("ours") else "s--"
            panel.loglog(sizes, times, style, label=library, markersize=3, linewidth=1)
        title = "1 query" if count == 1 else f"{count} queries at once"
        panel.set(title=title, xlabel="embeddings", ylabel="milliseconds")
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    """Parse the arguments, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1_000_000], help="rows of the gallery"
    )
    parser.add_argument("--plot", help="picture (.png) of milliseconds against --sizes")
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
        args.sizes, args.dim, args.k, args.queries, args.rounds = [20_000], 32, 10, [1, 16], 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before the end"))
    status, found = 0, {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            failed, found[size] = measure(args, size, Path(folder))
        status |= failed
    if args.plot:
        plot(found, args.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
