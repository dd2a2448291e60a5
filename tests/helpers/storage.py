"""Google Cloud Storage on the loopback: the part of its JSON API that TensorStore and gcsfs call.

Objects are in memory; every write is atomic and gives a generation, and the conditions on
generations hold, as in the service. There is no authentication.

    python tests/helpers/storage.py 9023
"""

import json
import re
import sys
import threading
import time
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(
    r"^(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)"
    r"(?:/(?:rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+))?$"
)
LIST = re.compile(r"^/storage/v1/b/([^/]+)/o/?$")
BUCKET = re.compile(r"^/storage/v1/b/([^/]+)$")
UPLOAD = re.compile(r"^/upload/storage/v1/b/([^/]+)/o$")


class Storage:
    """The objects of all buckets; each is its content and its generation."""

    def __init__(self):
        self.objects = {}
        self.uploads = {}
        self.requests = []
        self.lock = threading.RLock()
        self.generation = time.time_ns() // 1000

    def next_number(self):
        with self.lock:
            self.generation += 1
            return self.generation

    def write(self, bucket, name, content):
        with self.lock:
            self.objects[bucket, name] = content, self.next_number()
            return self.describe(bucket, name)

    def describe(self, bucket, name):
        content, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def refusal(self, bucket, name, query):
        """The status of a condition that does not hold, or None."""
        _, generation = self.objects.get((bucket, name), (b"", 0))
        for key, wanted, status in (
            ("ifGenerationMatch", True, 412),
            ("ifGenerationNotMatch", False, 304),
        ):
            if key in query and (int(query[key]) == generation) != wanted:
                return status
        return None


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 304:
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        storage, content = self.server.storage, self.body()
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        query = {name: values[-1] for name, values in query.items()}
        storage.requests.append((self.command, path))
        with storage.lock:
            self.dispatch(storage, path, query, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any  # noqa: N815

    def dispatch(self, storage, path, query, content):
        if match := UPLOAD.match(path):
            return self.upload(storage, match[1], query, content)
        if match := LIST.match(path):
            return self.answer(200, self.listing(storage, match[1], query))
        if match := OBJECT.match(path):
            bucket, name, to_bucket, to_name = (x and unquote(x) for x in match.groups())
            return self.object(storage, bucket, name, to_bucket, to_name, query)
        if match := BUCKET.match(path):
            return self.answer(200, {"kind": "storage#bucket", "name": match[1], "id": match[1]})
        if path.startswith("/batch/"):
            return self.batch(storage, content)
        return self.answer(404, {"error": {"code": 404, "message": path}})

    def object(self, storage, bucket, name, to_bucket, to_name, query):
        exists = (bucket, name) in storage.objects
        if status := storage.refusal(bucket, name, query):
            return self.answer(status, {"error": {"code": status, "message": "condition"}})
        if not exists:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        content, generation = storage.objects[bucket, name]
        if to_name:
            resource = storage.write(to_bucket or bucket, to_name, content)
            if "/moveTo/" in self.path:
                del storage.objects[bucket, name]
            size = str(len(content))
            done = {"done": True, "resource": resource, "objectSize": size}
            done["totalBytesRewritten"] = size
            return self.answer(200, done if "rewriteTo" in self.path else resource)
        if self.command == "DELETE":
            del storage.objects[bucket, name]
            return self.answer(204)
        if self.command == "GET" and query.get("alt") == "media":
            headers = {"X_Goog_Generation": str(generation), "Content_Type": "binary/octet-stream"}
            part = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
            if part is None:
                return self.answer(200, content, **headers)
            first, last = int(part[1]), min(int(part[2] or 1 << 60), len(content) - 1)
            if first >= len(content):
                return self.answer(416, Content_Range=f"bytes */{len(content)}")
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], **headers)
        return self.answer(200, storage.describe(bucket, name))

    def listing(self, storage, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after = query.get("pageToken", "")
        start, most = query.get("startOffset", ""), int(query.get("maxResults", 1000))
        items, folders, last = [], [], None
        for where, name in sorted(storage.objects):
            if where != bucket or not name.startswith(prefix) or name <= after or name < start:
                continue
            if len(items) + len(folders) >= most:
                return {"items": items, "prefixes": folders, "nextPageToken": last}
            last = name
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                items.append(storage.describe(bucket, name))
            elif name[: cut + 1] not in folders:
                folders.append(name[: cut + 1])
        return {"kind": "storage#objects", "items": items, "prefixes": folders}

    def upload(self, storage, bucket, query, content):
        kind = query.get("uploadType")
        if "upload_id" in query:
            return self.resume(storage, query["upload_id"], content)
        name = query.get("name")
        if kind == "resumable":
            name = name or json.loads(content or b"{}").get("name")
            number = str(storage.next_number())
            storage.uploads[number] = bucket, name, query, bytearray()
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o"
            return self.answer(200, {}, Location=f"{where}?uploadType=resumable&upload_id={number}")
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            description, data = message_from_bytes(head + content).get_payload()
            name = name or json.loads(description.get_payload(decode=True))["name"]
            # The parser changes line ends of binary data: take it from the body itself.
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            content = content.split(b"--" + boundary)[2].partition(b"\r\n\r\n")[2][:-2]
        return self.store(storage, bucket, name, query, content)

    def resume(self, storage, number, content):
        bucket, name, query, received = storage.uploads[number]
        received += content
        total = self.headers.get("Content-Range", "bytes */*").rpartition("/")[2]
        if total == "*" or len(received) < int(total):
            return self.answer(308, Range=f"bytes=0-{len(received) - 1}")
        del storage.uploads[number]
        return self.store(storage, bucket, name, query, bytes(received))

    def store(self, storage, bucket, name, query, content):
        if status := storage.refusal(bucket, name, query):
            return self.answer(status, {"error": {"code": status, "message": "condition"}})
        described = storage.write(bucket, name, content)
        return self.answer(200, described, X_Goog_Generation=described["generation"])

    def batch(self, storage, content):
        """Several deletions in one request."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
        answers = []
        for part in content.decode().split(f"--{boundary}"):
            for path in re.findall(r"DELETE (\S+)", part):
                match = OBJECT.match(urlsplit(path).path)
                key = unquote(match[1]), unquote(match[2])
                status = "204 No Content" if storage.objects.pop(key, None) else "404 Not Found"
                number = re.search(r"Content-ID: <?([^>\r\n]+)", part)
                answers.append(
                    f"--answers\r\nContent-Type: application/http\r\nContent-ID: "
                    f"<response-{number[1] if number else 0}>\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
                )
        body = ("".join(answers) + "--answers--").encode()
        self.answer(200, body, Content_Type="multipart/mixed; boundary=answers")


class Server(ThreadingHTTPServer):
    """A server that does not print the end of a client that waited for an answer."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(port=0):
    """Start a server in a thread, at ``server.address``; ``server.storage`` has the objects."""
    server = Server(("127.0.0.1", port), Handler)
    server.storage = Storage()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def environment(server):
    """The variables by which TensorStore and gcsfs find the server."""
    return {
        "STORAGE_EMULATOR_HOST": server.address,
        "TENSORSTORE_GCS_HTTP_URL": server.address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "FSSPEC_GCS": json.dumps({"token": "anon"}),
        "NO_GCE_CHECK": "true",
    }


if __name__ == "__main__":
    serve(int(sys.argv[1]))
    threading.Event().wait()
