"""The JSON API: answers, limits, and what is refused with which words."""

import asyncio
import sys
import threading

import pytest
from fastapi.testclient import TestClient

from c2f_jax.errors import UserError
from c2f_jax.matcher import match
from c2f_jax.serving.app import create_app
from c2f_jax.serving.limits import Limits, Refusal
from c2f_jax.serving.server import addresses, serve
from c2f_jax.serving.service import Service
from c2f_jax.serving.uploads import UploadGuard
from c2f_jax.serving.worker import Worker


@pytest.fixture(scope="module")
def client(service):
    with TestClient(create_app(service, service.limits), raise_server_exceptions=False) as found:
        yield found


def detail(response, status):
    assert response.status_code == status, response.text
    return response.json()["detail"]


def test_answers_are_those_of_the_retriever_and_nothing_is_compiled(client, service, wav):
    programs = match._cache_size()
    for seconds in (0.1, 0.3, 0.6, 1.0):
        for rerank in (0, 1, 3):
            found = client.post("/api/search", params={"rerank": rerank}, content=wav(seconds))
            assert found.status_code == 200, found.text
            expected = service.retrievers["image"].search(wav(seconds), rerank=rerank)
            found = found.json()
            assert [a["row"] for a in found["answers"]] == [a.row for a in expected]
            assert [a["row"] for a in found["coarse"]] == [a.row for a in expected.coarse]
            logits = [a["match_logit"] for a in found["answers"]]
            assert logits == pytest.approx([a.match_logit for a in expected])
            assert "path" not in found["answers"][0] and found["searched"] == 6
    assert match._cache_size() == programs


def test_a_form_both_directions_and_again(client, wav, picture):
    form = client.post("/api/search", files={"file": ("q.wav", wav(), "audio/wav")}).json()
    raw = client.post("/api/search", content=wav()).json()
    assert form["answers"] == raw["answers"]
    again = client.get(f"/api/queries/{raw['query']}/answers", params={"top": 2}).json()
    assert again["answers"] == raw["answers"][:2]
    back = client.post("/api/search?find=speech", content=picture(1)).json()
    assert back["searched"] == 4 and back["answers"]
    url = f"/api/queries/{back['query']}/attention/{back['answers'][0]['row']}"
    assert client.get(url).json()["grid"]


def test_where(client, wav):
    found = client.post("/api/search", params={"where": "name = '03.png'"}, content=wav()).json()
    assert [answer["name"] for answer in found["answers"]] == ["03.png"]
    assert detail(client.post("/api/search?where=nonsense!", content=wav()), 422)


def test_attention(client, wav):
    asked = client.post("/api/search", content=wav(0.75)).json()
    url = f"/api/queries/{asked['query']}/attention/{asked['answers'][0]['row']}"
    found = client.get(url).json()
    rows, columns = found["grid"]
    assert found["seconds"] == 0.75
    for weights in found["weights"]:
        assert len(weights) == rows * columns and sum(weights) == pytest.approx(1, abs=1e-3)
    assert "no item" in detail(client.get(url + "999"), 404)
    assert "no longer kept" in detail(client.get("/api/queries/none/attention/0"), 404)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"neither sound nor image" * 20, "the query"),
        ("silent", "silent"),
        ("short", "too short"),
        ("long", "too long: 6.0 s; at most 5 s"),
        ("truncated", "the query"),
        ("picture", "is an image, not a recording"),
    ],
)
def test_bad_queries(client, wav, picture, content, words):
    made = {
        "silent": lambda: wav(level=0.0),
        "short": lambda: wav(0.001),
        "long": lambda: wav(6.0),
        "truncated": lambda: wav()[:30],
        "picture": lambda: picture(0),
    }
    body = made[content]() if isinstance(content, str) else content
    message = detail(client.post("/api/search", content=body), 422)
    assert words in message and "--" not in message


def test_bad_parameters(client, wav):
    for params, words in (
        ({"top": 0}, "top=0: must be from 1"),
        ({"top": "x"}, "top"),
        ({"rerank": 99}, "rerank=99: must be from 0 to 3"),
        ({"find": "video"}, "find=video"),
    ):
        assert words in detail(client.post("/api/search", params=params, content=wav()), 422)
    page = {"content-type": "text/html"}
    assert "text/html" in detail(client.post("/api/search", content=b"<p>", headers=page), 415)
    other = {"files": {"other": ("q.wav", wav())}}
    assert "field `file`" in detail(client.post("/api/search", **other), 422)
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert detail(client.post("/api/search", content=b"no form", headers=form), 422)
    assert "larger than" in detail(client.post("/api/search", content=bytes(250_000)), 413)


def test_items(client, gallery):
    assert client.get("/api/items/0/thumbnail").headers["content-type"].startswith("image/")
    media = client.get("/api/items/0/media")
    assert media.content == (gallery / "00.png").read_bytes()
    recording = client.get("/api/items/0/thumbnail?find=speech")
    assert recording.content[:4] == b"fLaC"
    for row in (-1, 6, 10**30):
        assert "no item" in detail(client.get(f"/api/items/{row}/thumbnail"), 404)
    assert client.get("/api/items/..%2f..%2fetc%2fpasswd/media").status_code in (404, 422)

    # A link out of the gallery that takes the place of a file is not followed.
    aside = (gallery / "05.png").rename(gallery.parent / "outside.png")
    try:
        assert "not there" in detail(client.get("/api/items/5/media"), 404)
        (gallery / "05.png").symlink_to(aside)
        assert "not there" in detail(client.get("/api/items/5/media"), 404)
    finally:
        (gallery / "05.png").unlink()
        aside.rename(gallery / "05.png")


def test_page_health_metrics_and_openapi(client, wav):
    client.post("/api/search", content=wav())
    client.get("/made/up")
    assert client.get("/healthz").json() == {"status": "ok"}
    text = client.get("/metrics").text
    assert 'c2f_requests_total{route="/api/search",status="200"}' in text
    assert 'route="unknown",status="404"' in text and "made" not in text
    assert 'c2f_items{kind="image"} 6' in text and "c2f_queue 0" in text
    assert 'c2f_stage_seconds_count{stage="fine"}' in text
    page = client.get("/")
    assert "Search by voice" in page.text and "http" not in page.text
    for name in ("app.js", "style.css"):
        assert client.get(f"/static/{name}").status_code == 200
    assert "multipart/form-data" in client.get("/openapi.json").text
    assert client.get("/docs").status_code == 200


def test_a_full_queue_is_503(service, wav):
    with TestClient(create_app(service, Limits(queue=1))) as client:
        running, go_on = threading.Event(), threading.Event()
        answer = service.answer

        def wait(*args, **options):
            running.set()
            assert go_on.wait(20)
            return answer(*args, **options)

        service.answer = wait
        try:
            found = []
            ask = lambda: found.append(client.post("/api/search", content=wav()))  # noqa: E731
            first = threading.Thread(target=ask)
            first.start()
            assert running.wait(20)
            refused = client.post("/api/search", content=wav())
            assert "busy" in detail(refused, 503) and refused.headers["retry-after"] == "1"
            assert client.get("/healthz").status_code == 200, "the model does not block others"
            go_on.set()
            first.join()
        finally:
            del service.answer
        assert found[0].status_code == 200


def test_a_job_counts_until_it_ends():
    async def check():
        worker, go_on = Worker(1), threading.Event()
        task = asyncio.create_task(worker.run(go_on.wait))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(Refusal):
            await worker.run(lambda: None)
        go_on.set()
        while worker.jobs:
            await asyncio.sleep(0.01)
        assert await worker.run(lambda: 5) == 5
        worker.close()

    asyncio.run(check())


def test_a_slow_upload_is_408(service):
    sent = []

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    class Counts:
        def count_request(self, *found):
            sent.append(found)

    guard = UploadGuard(None, Limits(upload_seconds=0.1), Counts())
    asyncio.run(guard({"type": "http", "method": "POST"}, receive, send))
    assert sent[0] == ("upload", 408) and sent[1]["status"] == 408


def test_addresses():
    assert "localhost:80 (the microphone works" in addresses("127.0.0.1", 80)[0]
    assert any("ssh -L 80:localhost:80" in line for line in addresses("0.0.0.0", 80))
    assert "HTTPS" in addresses("192.0.2.1", 80)[1]


def test_a_taken_port(retrievers):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            serve(retrievers, "127.0.0.1", taken.getsockname()[1])


def test_without_sim(model, retrievers, monkeypatch, wav):
    from c2f_jax.inference import TrainedModel

    monkeypatch.setattr(TrainedModel, "has_sim", property(lambda self: False))
    service = Service({"image": retrievers["image"]}, Limits())
    service.warm_up()
    assert service.about()["rerank"] == 0 and not service.about()["attention"]
    found = service.answer(service.read(wav(), "image", "it"))
    assert found["answers"] == found["coarse"]
    monkeypatch.undo()
    retrievers["image"].pairs_at_once = model.experiment.eval.k


def test_the_command_names_what_is_wrong(capsys, monkeypatch):
    from c2f_jax.main import main

    assert main(["serve", "--workdir=run", "--index=a", "--gallery=b"]) == 2
    assert "leave out --gallery" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--workdir=run"]) == 2
    assert "pip install 'c2f_jax[serve]'" in capsys.readouterr().err
