"""The results page holds every example, loads nothing and runs nothing; the PNGs show what they are
given."""

import base64
import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from c2f_jax.models.c2f import Encoded
from c2f_jax.reports import examples as examples_
from c2f_jax.reports import figures, html, results_page
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.evaluation import EvalConfig, evaluate_retrieval


class Page(HTMLParser):
    """Tags, links and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.hits = [], [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [
            attributes[name]
            for name in ("src", "href", "srcset", "action", "data")
            if name in attributes
        ]
        self.hits += tag == "li" and attributes.get("class") == "hit"

    def handle_data(self, data):
        self.text += data


def solid(color, caption=""):
    return html.image_media(np.full((24, 32, 3), color, np.uint8), caption)


def spoken(number, caption):
    return html.Media(f"RIFF{number}".encode(), "audio/wav", caption, f"speaker {number}")


@pytest.fixture(scope="module")
def evaluated():
    rng = np.random.default_rng(0)
    speech, noise = rng.normal(size=(2, 12, 4))
    speech, image = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (speech, speech + noise)
    )
    tokens = np.arange(12, dtype=np.float32).reshape(-1, 1, 1)
    encoded = EncodedSplit(
        Encoded(speech, tokens, np.ones(12, int)),
        Encoded(image, tokens, None),
        np.arange(12),
        np.arange(12),
    )

    def match_fn(speech_tokens, lengths, image_tokens):
        same = (speech_tokens == image_tokens)[:, 0, 0]
        return np.stack([np.zeros(len(same)), 5.0 * same], 1)

    result = evaluate_retrieval(encoded, EvalConfig(k=4, resamples=50), match_fn, tau=0.1)
    return dataclasses.replace(result, step=1500)


def make_page(tmp_path, evaluated):
    lists = evaluated.lists
    captions = [
        f"caption {number} <script>alert('{number}')</script> & \"$x$\"" for number in range(12)
    ]
    query, item = (
        lambda row: spoken(row, captions[row]),
        lambda row: solid(20 * row, f"picture {row}"),
    )
    worst = examples_.worst_queries(lists["s2i"], 2)
    examples = examples_.PageExamples(
        speech=examples_.make_examples(lists["s2i"], [0, 3, 5], query, item, answer=item),
        failures=examples_.make_examples(lists["s2i"], worst, query, item, answer=item),
        image=examples_.make_examples(lists["i2s"], [1, 2], item, query),
    )
    path = tmp_path / "new folder" / "page.html"
    results_page.write_results_page(
        path,
        title="Run <1>",
        data_set="toy & test",
        result=evaluated,
        curves_png=b"PNGBYTES",
        examples=examples,
    )
    return path.read_text(encoding="utf-8"), examples


def test_page_is_self_contained_and_escapes_captions(tmp_path, evaluated):
    text, _ = make_page(tmp_path, evaluated)
    page = Page(text)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in text.replace("&#x27;", "") and "url(" not in text and "@import" not in text
    assert "caption 3 <script>alert('3')</script> & \"$x$\"" in page.text
    assert "Run <1>" in page.text and "toy & test" in page.text and "1,500" in page.text


def test_page_holds_every_example_with_its_media_hits_and_ranks(tmp_path, evaluated):
    text, groups = make_page(tmp_path, evaluated)
    page = Page(text)
    examples = [*groups.speech, *groups.failures, *groups.image]
    assert len(groups.speech) == 3 and len(examples) >= 6
    held = [base64.b64decode(link.split(";base64,")[1]) for link in page.links]
    shown = [
        media
        for example in examples
        for media in (
            example.query,
            *example.coarse,
            *example.fine,
            *([example.answer] if example.answer else []),
        )
    ]
    assert sorted(held) == sorted([media.data for media in shown] + [b"PNGBYTES"])
    assert page.tags.count("audio") == sum(media.mime == "audio/wav" for media in shown)
    hits = sum(sum(example.coarse_hits) + sum(example.fine_hits) for example in examples)
    assert hits > 0 and page.hits == page.text.count("✓") == hits
    for example in examples:
        assert f"coarse rank {example.coarse_rank} → fine rank {example.fine_rank}" in page.text
    assert page.tags.count("article") == len(examples)


def test_page_shows_the_metrics(tmp_path, evaluated):
    page = Page(make_page(tmp_path, evaluated)[0])
    for stage in (evaluated.coarse, evaluated.fine):
        for metrics in (stage.speech_to_image, stage.image_to_speech):
            low, high = metrics["R@5"].interval
            assert f"{metrics['R@5'].value:.1f}{low:.1f}\u2009…\u2009{high:.1f}" in page.text


def test_page_of_a_coarse_only_result(tmp_path):
    rows = np.eye(6)
    encoded = EncodedSplit(
        Encoded(rows, None, None), Encoded(rows, None, None), np.arange(6), np.arange(6)
    )
    result = evaluate_retrieval(encoded, EvalConfig(k=3, resamples=10), tau=0.1)
    lists = result.lists
    places = examples_.random_queries(lists["s2i"], 9)
    examples = examples_.make_examples(lists["s2i"], places, lambda row: spoken(row, ""), solid)
    results_page.write_results_page(
        tmp_path / "page.html",
        title="t",
        data_set="d",
        result=result,
        examples=examples_.PageExamples(speech=examples),
    )
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert (
        page.tags.count("article") == 6
        and "Fine (SIM)" not in page.text
        and "coarse rank 1" in page.text
    )
    assert len(examples_.worst_queries(lists["s2i"], 3)) == 0  # nothing failed


def test_queries_are_chosen_by_seed_and_by_rank(evaluated):
    ranked = evaluated.lists["s2i"]
    first, again = (
        examples_.random_queries(ranked, 5, seed=1),
        examples_.random_queries(ranked, 5, seed=1),
    )
    np.testing.assert_array_equal(first, again)
    assert len(set(first.tolist())) == 5
    worst = examples_.worst_queries(ranked, 4)
    assert ranked.fine_rank[worst[0]] == ranked.fine_rank.max() > 1
    assert (np.diff(ranked.fine_rank[worst]) <= 0).all()


def test_media_of_arrays_decode_again():
    noisy = html.image_media(
        np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8), max_side=200
    )
    assert noisy.mime == "image/jpeg" and Image.open(io.BytesIO(noisy.data)).size == (200, 100)
    flat = html.image_media(np.full((40, 40, 3), (200, 30, 60), np.uint8))
    assert flat.mime == "image/png" and Image.open(io.BytesIO(flat.data)).getpixel((5, 5)) == (
        200,
        30,
        60,
    )
    soundfile = pytest.importorskip("soundfile")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    sound = html.speech_media(tone, caption="a tone", speaker="s1")
    decoded, rate = soundfile.read(io.BytesIO(sound.data))
    assert rate == 16_000 and abs(len(decoded) - 16_000) < 3000 and np.abs(decoded).max() > 0.4
    loudest = np.argmax(np.abs(np.fft.rfft(decoded))) * rate / len(decoded)
    assert loudest == pytest.approx(440, rel=0.01)


def pixels_like(data, color):
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    return int((np.abs(image - np.array(color)).max(-1) < 8).sum())


def test_contact_sheet_shows_images_and_marks_hits(tmp_path):
    red, blue = solid((250, 0, 0)), solid((0, 0, 250))
    query = spoken(1, "what costs $5 and $6")
    example = examples_.Example(query, [red, blue], [False, True], 2, [blue, red], [True, False], 1)
    marked = figures.results_png(tmp_path / "sheet.png", [example], title="a $title")
    assert (tmp_path / "sheet.png").read_bytes() == marked
    unknown = examples_.Example(example.query, example.coarse, [False, False])
    unmarked = figures.results_png(None, [unknown])
    green = (10, 125, 60)
    assert pixels_like(marked, green) > 1000 and pixels_like(unmarked, green) == 0
    once, twice = pixels_like(unmarked, (250, 0, 0)), pixels_like(marked, (250, 0, 0))
    assert once > 1000 and twice > 1.8 * once  # in the coarse list, and in the fine one too


def test_learning_curves_draw_what_was_recorded(tmp_path):
    steps = [(step, step / 10.0) for step in range(10)]
    history = {
        "train/sic_loss": steps,
        "train/tau": steps,
        "train/sim_accuracy": steps,
        "train/speed": steps,
        "eval/toy/coarse/s2i/R@1": steps,
        "eval/toy/fine/s2i/R@1": steps,
        "eval/toy/fine/i2s/R@1": [],
    }
    data = figures.learning_curves_png(tmp_path / "deep" / "curves.png", history)
    assert (tmp_path / "deep" / "curves.png").read_bytes() == data
    four, one = (
        Image.open(io.BytesIO(png)).size
        for png in (data, figures.learning_curves_png(None, {"train/tau": steps, "other": steps}))
    )
    assert four == pytest.approx((2 * one[0], 2 * one[1]), abs=2)
    nothing = figures.learning_curves_png(None, {"train/loss": []})
    blue = (47, 91, 208)
    assert pixels_like(data, blue) > 500 and pixels_like(nothing, blue) == 0
