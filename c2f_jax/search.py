"""Search a gallery: pictures by voice, recordings by a picture."""

import functools
from pathlib import PurePath

import jax
import numpy as np
from etils import epath

from c2f_jax.data.audio import decode_audio
from c2f_jax.data.images import decode_image
from c2f_jax.data.source import SAMPLE_RATE
from c2f_jax.datasets.registry import is_data_set, load_pairs
from c2f_jax.errors import UserError
from c2f_jax.inference import LENGTH_BUCKETS, encode_image, encode_speech, load_trained, matcher
from c2f_jax.models.c2f import Encoded
from c2f_jax.reports.examples import Example
from c2f_jax.reports.figures import results_png
from c2f_jax.reports.html import picture, recording
from c2f_jax.reports.results_page import write_search_page
from c2f_jax.retrieval.index import AUDIO_SUFFIXES, IMAGE_SUFFIXES, GalleryIndex, list_media
from c2f_jax.retrieval.ranking import coarse_top_k, fine_scores, rerank
from c2f_jax.training.parallel import round_up_rows, split_rows


def build_index(workdir, gallery=None, *, kind="image", split=None, step="best", trained=None):
    """Encode a gallery with a trained run.

    Args:
      workdir: directory of the run.
      gallery: folder of files, data set name or manifest; None for the run's own data set.
      kind: "image" or "speech".
      split: of a data set or manifest; None for the run's test split.
      step: "best", "latest" or a number.
      trained: what ``load_trained`` returned, where it is at hand.

    Returns:
      GalleryIndex. Files that cannot be read are named on standard output and left out.
    """
    experiment, params, number, _ = trained or load_trained(workdir, step=step)
    names, files = _gallery_files(experiment, gallery, kind, split)
    decoded, kept = [], []
    for position, (name, file) in enumerate(zip(names, files, strict=True)):
        try:
            decoded.append(_decode(experiment, kind, file))
            kept.append(position)
        except UserError as error:
            print(f"left out: {name}: {error}")
    if not kept:
        raise UserError(f"{gallery}: none of the {len(files)} files can be read")
    encoded = _encode(experiment, params, kind, decoded)
    media = [
        files[p] if isinstance(files[p], bytes) else epath.Path(files[p]).read_bytes() for p in kept
    ]
    return GalleryIndex(
        kind,
        f"{workdir}@{number}",
        [names[p] for p in kept],
        media,
        encoded.embedding,
        encoded.tokens,
        encoded.lengths,
    )


def search(
    workdir,
    *,
    audio=(),
    say=(),
    images=(),
    gallery=None,
    split=None,
    index=None,
    step="best",
    k=None,
    top=5,
    output=None,
):
    """Answer queries and write a page and, for spoken queries, a picture of the answers.

    Args:
      workdir: directory of a training run.
      audio: recordings as queries; or
      say: sentences, spoken by espeak-ng; or
      images: pictures as queries.
      gallery, split: what to search, as in ``build_index``; or
      index: path of a saved GalleryIndex.
      step: "best", "latest" or a number.
      k: candidates that SIM re-ranks; None for the run's value.
      top: answers of each query.
      output: path of the page; None for ``<workdir>/search.html``.

    Returns:
      The path of the page. Answers are printed as they are found.
    """
    for name, value in (("top", top), ("k", k)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: at least 1 is expected")
    page = epath.Path(output or epath.Path(workdir) / "search.html")
    if page.suffix != ".html":
        raise UserError(f"--output={output}: the page's file is expected, which ends in .html")
    if index and (gallery or split):
        raise UserError("--index is searched as it is: leave out --gallery and --split")
    trained = load_trained(workdir, step=step)
    experiment, params, number, _ = trained
    query_kind, kind = ("image", "speech") if images else ("speech", "image")
    names, files = list(images or audio or say), list(images or audio)
    if say:
        files = [_spoken(text) for text in say]
    decoded = [_decode(experiment, query_kind, file) for file in files]
    items = (
        GalleryIndex.load(index)
        if index
        else build_index(workdir, gallery, kind=kind, split=split, trained=trained)
    )
    if items.kind != kind:
        raise UserError(
            f"{index} holds {items.kind} items, but these queries look for {kind} items: "
            f"make one with `c2f index --kind={kind}`"
        )
    if items.embeddings.shape[1] != experiment.model.embedding_size or not items.model.endswith(
        f"@{number}"
    ):
        raise UserError(
            f"{index} was encoded by {items.model}, the queries by {workdir}@{number}: make the index again"
        )
    queries = _encode(experiment, params, query_kind, decoded)

    coarse, fine = _rank(experiment, params, number, queries, items, k or experiment.eval.k, top)
    show = functools.cache(lambda row: _media(kind, items.media[row], items.names[row]))
    examples = []
    for row, name in enumerate(names):
        lists = [coarse[row, :top].tolist(), None if fine is None else fine[row, :top].tolist()]
        print(f"\n{name}")
        for place, item in enumerate(lists[1] or lists[0], 1):
            print(f"  {place}. {items.names[item]}")
        shown = [[show(item) for item in best] if best else None for best in lists]
        unknown = [False] * top
        asked = _media(query_kind, decoded[row], name)
        examples.append(
            Example(
                asked,
                shown[0],
                unknown[: len(shown[0])],
                fine=shown[1],
                fine_hits=unknown[: len(shown[0])],
            )
        )
    what = "pictures" if kind == "image" else "recordings"
    searched = f"{len(items.names):,} {what} of {index or gallery or experiment.data.name}"
    write_search_page(page, examples, way="s2i" if kind == "image" else "i2s", gallery=searched)
    if kind == "image":
        results_png(page.with_suffix(".png"), examples, top=top)
    return page


def _rank(experiment, params, step, queries, items, k, top):
    """At least ``top`` rows of the items for each query, best first: coarse, and fine (None before SIM is trained)."""
    k = min(k, len(items.names))
    cosine, coarse = coarse_top_k(queries.embedding, items.embeddings, max(k, top))
    if not experiment.method.has_sim(step):
        return coarse, None
    by_voice = items.kind == "image"
    logits = rerank(
        matcher(experiment.model, params),
        queries.tokens,
        items.tokens,
        coarse[:, :k],
        direction="s2i" if by_voice else "i2s",
        speech_lengths=queries.lengths if by_voice else items.lengths,
        pair_chunk=round_up_rows(params, experiment.eval.pair_batch_size),
        length_buckets=LENGTH_BUCKETS,
    )
    tau = float(experiment.model.apply({"params": params}, method="tau"))
    scores = fine_scores(cosine[:, :k], logits, tau)[experiment.eval.score]
    order = np.argsort(-scores, axis=1, kind="stable")
    return coarse, np.concatenate(
        [np.take_along_axis(coarse[:, :k], order, axis=1), coarse[:, k:]], axis=1
    )


def _gallery_files(experiment, gallery, kind, split):
    """Names and files (paths or bytes) of a gallery."""
    if gallery is not None and not is_data_set(gallery):
        files = list_media(gallery, IMAGE_SUFFIXES if kind == "image" else AUDIO_SUFFIXES)
        return files, files
    data = experiment.data
    source = load_pairs(
        gallery or data.name,
        split or data.test_split,
        data.data_dir,
        max_bad_share=data.max_bad_share,
    )
    if kind == "image":
        rows = range(source.num_images)
        return [source.image_id(row) for row in rows], [source.image(row) for row in rows]
    items = [source.recording(row) for row in range(len(source))]
    return [item["caption"] or f"recording {row}" for row, item in enumerate(items)], [
        item["audio"] for item in items
    ]


def _decode(experiment, kind, file):
    """A waveform (S,) float32 cut to the longest evaluation length, or an image (side, side, 3) uint8."""
    if kind == "image":
        data = experiment.data
        return decode_image(
            file, data.image_size, resize=data.image_resize, resize_side=data.image_resize_side
        )
    return decode_audio(file)[: round(experiment.data.max_seconds * SAMPLE_RATE)]


def _encode(experiment, params, kind, decoded):
    """Encode items in fixed-size batches: Encoded with numpy leaves."""
    size, parts = round_up_rows(params, min(experiment.eval.batch_size, len(decoded))), []
    samples = round(experiment.data.max_seconds * SAMPLE_RATE)
    for start in range(0, len(decoded), size):
        chunk = decoded[start : start + size]
        filled = chunk + [chunk[-1]] * (size - len(chunk))
        if kind == "image":
            encoded = encode_image(experiment.model, params, split_rows(params, np.stack(filled)))
        else:
            waveform = np.stack([np.pad(wave, (0, samples - len(wave))) for wave in filled])
            lengths = np.array([len(wave) for wave in filled], np.int32)
            encoded = encode_speech(
                experiment.model, params, *split_rows(params, (waveform, lengths))
            )
        kept = len(chunk)
        parts.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], encoded))
    return Encoded(
        *(np.concatenate(leaves).astype(leaves[0].dtype) for leaves in zip(*parts, strict=True))
    )


def _spoken(text):
    """A sentence as FLAC bytes in a voice that no training split of spoken_scenes uses."""
    from c2f_jax.datasets.spoken_scenes.speech import check_installed, draw_voice, speak

    check_installed()
    # A bare generator, which must stay so: the same sentence keeps its voice.
    voice = draw_voice(np.random.default_rng(list(text.encode())), "test")
    try:
        return speak(text, **voice)[0]
    except RuntimeError as error:
        raise UserError(
            f"--say {text!r} cannot be spoken ({error}): give a sentence in English"
        ) from error


def _media(kind, item, name):
    """What a page shows of an item: encoded bytes, a path, or what ``_decode`` returned."""
    label = PurePath(name).name
    if kind == "image":
        return picture(item if isinstance(item, np.ndarray) else decode_image(item, 128), label)
    return recording(item if isinstance(item, np.ndarray) else decode_audio(item), caption=label)
