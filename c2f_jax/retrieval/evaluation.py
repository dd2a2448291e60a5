"""Coarse and fine evaluation of one test set in both directions: from embeddings and tokens to numbers and a table."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from c2f_jax.errors import UserError
from c2f_jax.retrieval import ranking, recall

SCORES = ("sic", "sim", "sum", "prob", "joint")
DIRECTIONS = {"s2i": "speech_to_image", "i2s": "image_to_speech"}
NAMES = {"s2i": "speech -> image", "i2s": "image -> speech"}


@dataclass(frozen=True)
class EvalConfig:
    """Options of an evaluation; the metadata of a field are its range.

    Attributes:
      k: number of candidates for each query that SIM reranks; all of a gallery smaller than k.
      score: score that orders the candidates: "sic", "sim", "sum", "prob" or "joint".
      batch_size: rows encoded at once.
      pair_batch_size: pairs matched at once.
      resamples: number of bootstrap resamples behind the confidence intervals.
    """

    k: int = field(default=32, metadata={"min": 1})
    score: str = field(default="joint", metadata={"choices": SCORES})
    batch_size: int = field(default=100, metadata={"min": 1})
    pair_batch_size: int = field(default=256, metadata={"min": 1})
    resamples: int = field(default=1000, metadata={"min": 1})


@dataclasses.dataclass(frozen=True)
class RankedLists:
    """The rankings of one direction, for pages and analysis: q queries, L = min(max(k, 10), gallery size) items."""

    queries: (
        np.ndarray
    )  # (q,) row of each query in its own table; queries without a right item are left out
    coarse: np.ndarray  # (q, L) gallery rows, best first
    coarse_hits: np.ndarray  # (q, L) bool, the right ones among them
    coarse_rank: np.ndarray  # (q,) 1-based rank of the first right item in the whole gallery
    fine: np.ndarray | None = (
        None  # the same after re-ranking by the chosen score; None without a matcher
    )
    fine_hits: np.ndarray | None = None
    fine_rank: np.ndarray | None = None


def evaluate_retrieval(
    speech_embeddings,
    image_embeddings,
    speech_ids,
    image_ids,
    speech_tokens=None,
    speech_lengths=None,
    image_tokens=None,
    match_fn: Callable | None = None,
    *,
    k: int,
    tau: float,
    score: str = "joint",
    pair_chunk: int = ranking.PAIR_CHUNK,
    length_buckets: int = 1,
    resamples: int = recall.RESAMPLES,
    seed: int = 0,
) -> tuple[dict, dict[str, RankedLists]]:
    """All retrieval numbers of one test set, JSON-ready, and the ranked lists of "s2i" and "i2s".

    speech_embeddings (R, D), image_embeddings (M, D): L2-normalised. speech_ids (R,), image_ids (M,): equal ids are
    right answers, any number for a query; a query with none is left out and counted.
    speech_tokens (R, T, W), speech_lengths (R,), image_tokens (M, P, W): host arrays for the fine stage, and
    match_fn(speech_tokens, speech_lengths, image_tokens) -> (b, 2). Without match_fn only the coarse stage is reported.
    k candidates are re-ranked by `score`, one of ranking.fine_scores; all five are reported.

    Result: "coarse" and "fine", each {"speech_to_image": {"R@1": %, "R@1_interval": [lo, hi], ...}, "image_to_speech":
    {...}, "mean_recall": %}; "fine_scores", the same for each score; "difference", fine - coarse with paired intervals;
    "k", "score", "tau", "queries" (counts), "bootstrap", "seconds" (wall time of each stage, compilation included).
    Raises UserError on NaN or infinity (naming where), embeddings not normalised, sizes or options out of range.
    """
    tables = {
        "s2i": (np.asarray(speech_embeddings, np.float32), np.asarray(speech_ids)),
        "i2s": (np.asarray(image_embeddings, np.float32), np.asarray(image_ids)),
    }
    _check(tables, k, score, match_fn, speech_tokens, speech_lengths, image_tokens)
    tokens = {"s2i": speech_tokens, "i2s": image_tokens}

    seconds, lists, metrics, samples = {}, {}, {}, {}
    for direction, other in (("s2i", "i2s"), ("i2s", "s2i")):
        (queries, query_ids), (gallery, gallery_ids) = tables[direction], tables[other]
        answered = np.flatnonzero(np.isin(query_ids, gallery_ids))
        rows = (
            slice(None) if len(answered) == len(queries) else answered
        )  # a slice copies no tokens
        queries, query_ids = queries[rows], query_ids[rows]

        start = time.perf_counter()
        cosine, coarse = ranking.coarse_top_k(queries, gallery, max(k, 10))
        hits = gallery_ids[coarse] == query_ids[:, None]
        rank = ranking.first_relevant_rank(queries, gallery, query_ids, gallery_ids)
        # The list decides wherever it reaches, so that ranks and lists never differ by a rounding.
        rank = np.where(hits.any(1), hits.argmax(1) + 1, np.maximum(rank, hits.shape[1] + 1))
        seconds[f"coarse_{direction}"] = time.perf_counter() - start
        ranked = {"coarse": (coarse, hits, rank)}

        if match_fn is not None:
            start = time.perf_counter()
            lengths = np.asarray(speech_lengths)[rows] if direction == "s2i" else speech_lengths
            match_logits = ranking.rerank(
                match_fn,
                tokens[direction][rows],
                tokens[other],
                coarse[:, :k],
                direction=direction,
                speech_lengths=lengths,
                pair_chunk=pair_chunk,
                length_buckets=length_buckets,
            )
            for name, values in ranking.fine_scores(cosine[:, :k], match_logits, tau).items():
                ranked[name] = _reordered(coarse, hits, rank, values)
            seconds[f"fine_{direction}"] = time.perf_counter() - start

        names, counts = np.unique(gallery_ids, return_counts=True)
        relevant_counts = counts[np.searchsorted(names, query_ids)]
        for name, (_, name_hits, ranks) in ranked.items():
            metrics[name, direction] = recall.rank_metrics(ranks) | recall.list_metrics(
                name_hits, relevant_counts
            )
            samples[name, direction] = recall.bootstrap_metrics(
                ranks, query_ids, resamples=resamples, seed=seed
            )
        lists[direction] = RankedLists(answered, *ranked["coarse"], *ranked.get(score, ()))

    result = {"coarse": _both_directions("coarse", metrics, samples)}
    if match_fn is not None:
        result["fine"] = _both_directions(score, metrics, samples)
        result["fine_scores"] = {name: _both_directions(name, metrics, samples) for name in SCORES}
        result["difference"] = _differences(score, metrics, samples)
    recordings, images = len(tables["s2i"][0]), len(tables["i2s"][0])
    s2i, i2s = len(lists["s2i"].queries), len(lists["i2s"].queries)
    result |= {
        "k": k,
        "score": score,
        "tau": float(tau),
        "seconds": seconds,
        "queries": {
            "speech_to_image": s2i,
            "image_to_speech": i2s,
            "gallery_images": images,
            "gallery_recordings": recordings,
            "recordings_without_image": recordings - s2i,
            "images_without_recording": images - i2s,
        },
        "bootstrap": {
            "resamples": resamples,
            "seed": seed,
            "percentiles": list(recall.INTERVAL),
            "unit": "image id",
            "units": len(np.intersect1d(tables["s2i"][1], tables["i2s"][1])),
        },
    }
    return result, lists


def format_table(result: dict) -> str:
    """The console table: coarse and fine side by side with 95 % intervals, both directions, time of each stage."""
    fine = "fine" in result
    lines = []
    for direction, key in DIRECTIONS.items():
        gallery = result["queries"][
            "gallery_images" if direction == "s2i" else "gallery_recordings"
        ]
        lines.append(f"{NAMES[direction]}: {result['queries'][key]} queries, gallery of {gallery}")
        stages = [("coarse (SIC)", result["coarse"][key])]
        if fine:
            stages += [
                (f"fine (k={result['k']}, {result['score']})", result["fine"][key]),
                ("fine - coarse", result["difference"][key]),
            ]
        lines.append(f"  {'':12}" + "".join(f"{name:>27}" for name, _ in stages))
        for name, digits in (("R@1", 1), ("R@5", 1), ("R@10", 1), ("median_rank", 1), ("MRR", 3)):
            cells = (
                _cell(values, name, digits, signed=number == 2)
                for number, (_, values) in enumerate(stages)
            )
            lines.append(
                f"  {name.replace('_', ' '):12}" + "".join(f"{cell:>27}" for cell in cells)
            )
        times = [
            f"{result['seconds'][f'{stage}_{direction}']:.1f} s"
            for stage in (["coarse", "fine"][: 1 + fine])
        ]
        lines.append(f"  {'time':12}" + "".join(f"{cell:>27}" for cell in times) + "\n")
    stages = ["coarse"] + ["fine", "difference"] * fine
    cells = (
        _cell(result[stage], "mean_recall", 1, signed=stage == "difference") for stage in stages
    )
    lines.append(f"{'mean R@K':14}" + "".join(f"{cell:>27}" for cell in cells))
    if fine:
        lines.append("\nR@1 by score " + "".join(f"{name:>8}" for name in SCORES))
        for direction, key in DIRECTIONS.items():
            values = (result["fine_scores"][name][key]["R@1"] for name in SCORES)
            lines.append(f"{NAMES[direction]:13}" + "".join(f"{value:8.1f}" for value in values))
    bootstrap = result["bootstrap"]
    lines.append(
        f"\nR@K in %. [95 % intervals]: {bootstrap['resamples']} bootstrap resamples of {bootstrap['units']} "
        "image ids, all queries of an image together" + (", fine - coarse paired." if fine else ".")
    )
    return "\n".join(lines)


def _check(tables, k, score, match_fn, speech_tokens, speech_lengths, image_tokens) -> None:
    if score not in SCORES:
        raise UserError(f"score must be one of {', '.join(SCORES)}; got {score!r}.")
    if k < 1:
        raise UserError(f"k must be at least 1, the number of candidates to re-rank; got {k}.")
    for (embeddings, ids), kind in zip(tables.values(), ("speech", "image"), strict=True):
        if embeddings.ndim != 2 or ids.shape != embeddings.shape[:1]:
            raise UserError(
                f"{kind}_embeddings must be (rows, D), one id a row; got {embeddings.shape}, {ids.shape}."
            )
        ranking.check_finite(f"{kind}_embeddings", embeddings)
        norms = np.linalg.norm(embeddings, axis=1)
        if np.any(np.abs(norms - 1.0) > 0.02):
            row = int(np.argmax(np.abs(norms - 1.0)))
            raise UserError(
                f"{kind}_embeddings must be L2-normalised, their products are cosines; row {row} has norm "
                f"{norms[row]:.3g}. Divide each row by its norm."
            )
    if not np.isin(tables["s2i"][1], tables["i2s"][1]).any():
        raise UserError(
            "no recording shares its id with an image; speech_ids and image_ids must name the same images."
        )
    if match_fn is not None:
        expected = {
            "speech_tokens": len(tables["s2i"][0]),
            "speech_lengths": len(tables["s2i"][0]),
            "image_tokens": len(tables["i2s"][0]),
        }
        given = {
            "speech_tokens": speech_tokens,
            "speech_lengths": speech_lengths,
            "image_tokens": image_tokens,
        }
        for name, rows in expected.items():
            if given[name] is None or len(given[name]) != rows:
                raise UserError(
                    f"{name} must have {rows} rows, one for each embedding, for the fine stage; got "
                    f"{'none' if given[name] is None else len(given[name])}."
                )


def _reordered(coarse, hits, rank, values):
    """Lists, hits and first ranks after the leading candidates were put in order of their values."""
    order = np.tile(np.arange(coarse.shape[1]), (len(coarse), 1))
    order[:, : values.shape[1]] = ranking.fine_order(values)
    return (
        np.take_along_axis(coarse, order, 1),
        np.take_along_axis(hits, order, 1),
        ranking.fine_ranks(rank, values, hits[:, : values.shape[1]]),
    )


def _both_directions(name, metrics, samples) -> dict:
    result = {
        key: recall.with_intervals(metrics[name, way], samples[name, way])
        for way, key in DIRECTIONS.items()
    }
    return result | _mean_of_six(
        metrics[name, "s2i"], metrics[name, "i2s"], samples[name, "s2i"], samples[name, "i2s"]
    )


def _differences(name, metrics, samples) -> dict:
    result = {
        key: recall.difference_with_intervals(
            metrics[name, way], metrics["coarse", way], samples[name, way], samples["coarse", way]
        )
        for way, key in DIRECTIONS.items()
    }
    means = {
        stage: recall.mean_recall(metrics[stage, "s2i"], metrics[stage, "i2s"])
        for stage in (name, "coarse")
    }
    drawn = {
        stage: recall.mean_recall(samples[stage, "s2i"], samples[stage, "i2s"])
        for stage in (name, "coarse")
    }
    return result | recall.with_intervals(
        {"mean_recall": means[name] - means["coarse"]},
        {"mean_recall": drawn[name] - drawn["coarse"]},
    )


def _mean_of_six(s2i, i2s, s2i_samples, i2s_samples) -> dict:
    # The same images are drawn for both directions (same ids, same seed), so the samples may be averaged one by one.
    return recall.with_intervals(
        {"mean_recall": recall.mean_recall(s2i, i2s)},
        {"mean_recall": recall.mean_recall(s2i_samples, i2s_samples)},
    )


def _cell(values: dict, name: str, digits: int, signed: bool) -> str:
    sign = "+" if signed else ""
    low, high = values[f"{name}_interval"]
    return f"{values[name]:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
