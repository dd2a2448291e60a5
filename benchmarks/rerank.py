"""What the fine stage gives and what it costs: R@1 and time against k, and pairs a second.

    python benchmarks/rerank.py --workdir=runs/spoken_scenes [--plot=rerank.png]

The first table has, for each number of candidates k and each score that may order them, R@1 on the
test split of the run, with the milliseconds that SIM takes for one query: the median of --queries
queries, one after another, from tokens in memory to logits. One row of k = 0 is the coarse ranking.

The second has pairs a second of many queries at once, by c2f_jax and, where torch is installed, by
a PyTorch twin of the multimodal encoder with random weights and as many parameters: batches of the
same pairs, each padded to its longest recording. They take turns, --rounds times; "ratio" is the
median over the rounds.
"""

import argparse
import importlib.util
import statistics
import sys
import time

import jax
import numpy as np

from c2f_jax.inference import LENGTH_BUCKETS, TrainedModel
from c2f_jax.retrieval.ranking import coarse_top_k
from c2f_jax.retrieval.reranking import SCORES, fine_scores, match_candidates, rerank
from c2f_jax.training.parallel import round_up_rows

DIRECTIONS = {"s2i": "speech to image", "i2s": "image to speech"}


class Direction:
    """The queries of one direction and their candidates.

    Args:
      model: the trained model.
      encoded: the encoded split.
      name: "s2i" or "i2s".
      most: candidates of each query.
    """

    def __init__(self, model, encoded, name, most):
        sides = [encoded.speech, encoded.image]
        ids = [encoded.speech_ids, encoded.image_ids]
        if name == "i2s":
            sides, ids = sides[::-1], ids[::-1]
        self.model, self.name = model, name
        self.tokens = [np.asarray(side.tokens) for side in sides]
        self.lengths = np.asarray(encoded.speech.lengths)
        embeddings = [np.asarray(side.embedding) for side in sides]
        self.cosine, self.candidates = coarse_top_k(*embeddings, most)
        self.hits = ids[1][self.candidates] == ids[0][:, None]

    def match(self, queries, k, pairs):
        """Return the logits (queries, k); pairs are matched at once."""
        speech = self.name == "s2i"
        return match_candidates(
            self.model.staged_match,
            self.tokens[0][queries],
            self.tokens[1],
            self.candidates[queries, :k],
            direction=self.name,
            speech_lengths=self.lengths[queries] if speech else self.lengths,
            pair_chunk=round_up_rows(self.model.params, pairs),
            length_buckets=LENGTH_BUCKETS,
        )

    def milliseconds(self, k, queries):
        """Return the median time of one query."""
        seconds = []
        for query in [*range(min(10, queries)), *range(queries)]:  # the first compile
            began = time.perf_counter()
            self.match(slice(query, query + 1), k, k)
            seconds.append(time.perf_counter() - began)
        return 1e3 * statistics.median(seconds[-queries:])


def sweep(model, direction, ks, queries):
    """Print the first table of one direction; return score -> R@1 and the times, by k."""
    batch = model.pair_batch_size
    logits = direction.match(slice(None), max(ks), batch)
    scores = fine_scores(direction.cosine[:, : max(ks)], logits, model.tau)
    print(f"\n{DIRECTIONS[direction.name]}, {len(logits):,} queries, R@1 by score")
    row = "{:>4} {:>9}" + " {:>6}" * len(SCORES)
    print(row.format("k", "ms", *SCORES))
    recall = {name: [] for name in SCORES}
    times = []
    for k in (0, *ks):
        times.append(direction.milliseconds(k, queries) if k else 0.0)
        for name in SCORES:
            order = rerank(direction.hits, scores[name][:, :k]) if k else direction.hits
            recall[name].append(100 * order[:, 0].mean())
        cells = [f"{recall[name][-1]:.1f}" for name in SCORES]
        print(row.format(k, f"{times[-1]:.2f}", *cells), flush=True)
    return recall, times


def torch_matcher(model, direction):
    """Return a function that matches as ``Direction.match`` does, by PyTorch."""
    import torch
    from torch_step import Matcher

    own = model.experiment.model.multimodal_encoder
    speech, image = direction.tokens if direction.name == "s2i" else direction.tokens[::-1]
    network = Matcher(speech.shape[2], own.width, own.depth, own.heads, own.mlp_ratio).eval()
    ours = model.params["multimodal_encoder"]
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(ours)),
        sum(parameter.numel() for parameter in network.parameters()),
    ]
    print("parameters: {:,} ours, {:,} PyTorch".format(*counts))
    speech, image = torch.tensor(speech), torch.tensor(image)
    lengths = torch.tensor(direction.lengths)

    @torch.inference_mode()
    def match(queries, k, pairs):
        candidates = torch.tensor(direction.candidates[queries, :k])
        rows = [torch.arange(len(direction.tokens[0]))[queries, None].expand(-1, k), candidates]
        rows = [part.flatten() for part in rows]
        spoken, shown = rows if direction.name == "s2i" else rows[::-1]
        order = lengths[spoken].argsort()
        found = torch.empty(len(order), 2)
        for start in range(0, len(order), pairs):
            part = order[start : start + pairs]
            longest = lengths[spoken[part]]
            tokens = speech[spoken[part], : longest.max()]
            found[part] = network(tokens, longest, image[shown[part]])
        return found

    return match


def pairs_a_second(model, direction, k, queries, rounds):
    """Print the second table of one direction."""
    count = min(queries, len(direction.candidates))
    chosen, batch = slice(0, count), model.pair_batch_size
    programs = {"c2f_jax": direction.match}
    if importlib.util.find_spec("torch"):
        programs["PyTorch"] = torch_matcher(model, direction)
    else:
        print("PyTorch is left out: torch is not installed")
    rates = {name: [] for name in programs}
    for program in programs.values():
        program(chosen, k, batch)
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            program(chosen, k, batch)
            rates[name].append(count * k / (time.perf_counter() - began))
    pairs = [(a / b) for a, b in zip(rates["c2f_jax"], rates[list(rates)[-1]], strict=True)]
    print(f"\n{DIRECTIONS[direction.name]}, {count * k:,} pairs, batches of {batch}")
    for name, found in rates.items():
        ratio = f"  ratio {statistics.median(pairs):.2f}" if name == "c2f_jax" else ""
        print(f"{name:8} {statistics.median(found):8,.0f} pairs/s{ratio}")


def plot(found, ks, path):
    """Draw R@1 against k, and the time of a query; found is direction -> (R@1, times)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found) + 1, figsize=(4.2 * (len(found) + 1), 3.4))
    for panel, (name, (recall, _)) in zip(panels, found.items(), strict=False):
        for score, values in recall.items():
            panel.plot([0.5, *ks], values, "o-", label=score, markersize=3, linewidth=1)
        panel.set_title(DIRECTIONS[name])
        panel.set_ylabel("R@1")
    for name, (_, times) in found.items():
        panels[-1].plot(ks, times[1:], "o-", label=DIRECTIONS[name], markersize=3, linewidth=1)
    panels[-1].set(title="time of one query", ylabel="milliseconds", yscale="log")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xlabel("k, candidates that SIM reranks")
        panel.grid(alpha=0.3)
    panels[0].set_xticks([0.5, *ks], ["none", *ks])
    panels[1].set_xticks([0.5, *ks], ["none", *ks])
    panels[-1].set_xticks(ks, ks)
    panels[0].legend(fontsize=7)
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="run of c2f train, with SIM")
    parser.add_argument("--most", type=int, default=128, help="largest k (default: 128)")
    parser.add_argument("--queries", type=int, default=50, help="queries that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--plot", help="picture (.png) of the first table")
    args = parser.parse_args()
    model = TrainedModel.load(args.workdir)
    if not model.has_sim:
        sys.exit(f"{model.name} has no SIM to rerank with")
    data = model.experiment.data
    encoded = model.encode_split(data.load(data.test_split), progress=sys.stderr.isatty())
    ks = [2**power for power in range(20) if 2**power <= args.most]
    found = {}
    for name in DIRECTIONS:
        direction = Direction(model, encoded, name, max(ks))
        found[name] = sweep(model, direction, ks, args.queries)
        pairs_a_second(model, direction, model.experiment.eval.k, 20 * args.queries, args.rounds)
    if args.plot:
        plot(found, ks, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
