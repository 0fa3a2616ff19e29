"""The objects of Google Cloud Storage's XML API, as documented: `gcs_process.py PORT DIRECTORY TOKEN`.

obstore's client speaks that API; the emulators that package indexes have know no writes by it. What is here:
put with x-goog-if-generation-match, get and head with a range, delete, listing (list-type=2), uploads in
parts. What was answered with success survives the end of the process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

MIN_PART_BYTES = 5 << 20
PAGE = 1000
_XML = {"content-type": "application/xml; charset=UTF-8"}
_DECLARATION = "<?xml version='1.0' encoding='UTF-8'?>"
_NAMESPACE = "http://doc.s3.amazonaws.com/2006-03-01"


class Refused(Exception):  # noqa: N818 - an answer, no defect
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        inside = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.body = f"{_DECLARATION}{inside}".encode()


def _no_such_key() -> Refused:
    return Refused(404, "NoSuchKey", "The specified key does not exist.")


class Bucket:
    """Objects and uploads of one bucket; every change is one rename or one unlink."""

    def __init__(self, directory: Path) -> None:
        self._objects = directory / "objects"
        self._parts = directory / "parts"
        for place in (self._objects, self._parts):
            place.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._count = 0
        self._found: dict[str, dict[str, Any]] = {}
        for path in self._objects.iterdir():
            if not path.name.endswith(".tmp"):
                self._found[unquote(path.name)] = _about(path)

    def _write(self, path: Path, content: list[Path | bytes], about: dict[str, Any]) -> Path:
        with self._lock:
            self._count += 1
            temporary = path.with_name(f"{self._count}-{time.time_ns()}.tmp")
        with temporary.open("wb") as file:
            file.write(json.dumps(about).encode() + b"\n")
            for piece in content:
                file.write(piece if isinstance(piece, bytes) else _data(piece))
        return temporary

    def put(
        self, key: str, content: list[Path | bytes], tag: str, size: int, generation: str | None
    ) -> dict[str, Any]:
        about = {"etag": tag, "size": size, "modified": time.time()}
        path = self._objects / quote(key, safe="")
        about["generation"] = time.time_ns() // 1000
        temporary = self._write(path, content, about)
        with self._lock:
            there = self._found.get(key, {}).get("generation", 0)
            if generation is not None and int(generation) != there:
                temporary.unlink()
                message = "At least one of the pre-conditions you specified did not hold."
                raise Refused(412, "PreconditionFailed", message)
            temporary.rename(path)
            self._found[key] = about
        return about

    def about(self, key: str) -> dict[str, Any]:
        with self._lock:
            if key not in self._found:
                raise _no_such_key()
            return self._found[key]

    def read(self, key: str) -> bytes:
        try:
            return _data(self._objects / quote(key, safe=""))
        except FileNotFoundError:
            raise _no_such_key() from None

    def delete(self, key: str) -> None:
        self.about(key)
        with self._lock:
            self._found.pop(key, None)
            (self._objects / quote(key, safe="")).unlink(missing_ok=True)

    def list(self, prefix: str, after: str) -> list[tuple[str, dict[str, Any]]]:
        with self._lock:
            return [(k, self._found[k]) for k in sorted(self._found) if k.startswith(prefix) and k > after]

    def begin(self, key: str) -> str:
        upload = hashlib.md5(f"{key} {time.time_ns()}".encode()).hexdigest()
        (self._parts / upload).mkdir()
        return upload

    def _upload(self, upload: str) -> Path:
        path = self._parts / upload
        if not path.is_dir():
            raise Refused(404, "NoSuchUpload", "The requested upload was not found.")
        return path

    def put_part(self, upload: str, number: int, data: bytes) -> str:
        path = self._upload(upload) / str(number)
        tag = _tag(data)
        self._write(path, [data], {"etag": tag, "size": len(data)}).rename(path)
        return tag

    def complete(self, key: str, upload: str, said: list[tuple[int, str]]) -> dict[str, Any]:
        paths = [self._upload(upload) / str(number) for number, _ in said]
        if [number for number, _ in said] != sorted({number for number, _ in said}):
            raise Refused(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
        parts = [_about(path) if path.exists() else {"etag": None} for path in paths]
        if [part["etag"] for part in parts] != [tag for _, tag in said]:
            raise Refused(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if any(part["size"] < MIN_PART_BYTES for part in parts[:-1]):
            raise Refused(400, "EntityTooSmall", "A part is smaller than the minimum allowed size.")
        tag = f'"{hashlib.md5("".join(t for _, t in said).encode()).hexdigest()}-{len(parts)}"'
        about = self.put(key, [*paths], tag, sum(part["size"] for part in parts), None)
        self.abort(upload)
        return about

    def abort(self, upload: str) -> None:
        path = self._upload(upload)
        for part in path.iterdir():
            part.unlink()
        path.rmdir()


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        about: dict[str, Any] = json.loads(file.readline())
    return about


def _data(path: Path) -> bytes:
    with path.open("rb") as file:
        file.readline()
        return file.read()


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Service

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        self.query = {name: said[0] for name, said in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        try:
            self._authorize()
            if bucket not in self.server.buckets:
                raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
            self._serve(self.server.buckets[bucket], bucket, key, body)
        except Refused as refused:
            self._answer(refused.status, refused.body, _XML)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def _authorize(self) -> None:
        said = self.headers.get("authorization")
        if said is None:
            raise Refused(403, "AccessDenied", "Access denied.")
        if said != f"Bearer {self.server.token}":
            raise Refused(401, "AuthenticationRequired", "Authentication required.")

    def _serve(self, bucket: Bucket, name: str, key: str, body: bytes) -> None:
        serve: Callable[[Bucket, str, str, bytes], None] | None = {
            "GET": self._get if key else self._list,
            "HEAD": self._get,
            "PUT": self._put,
            "POST": self._post,
            "DELETE": self._delete,
        }.get(self.command)
        assert serve is not None
        serve(bucket, name, key, body)

    def _get(self, bucket: Bucket, _: str, key: str, __: bytes) -> None:
        about = bucket.about(key)
        headers = {
            "etag": about["etag"],
            "x-goog-generation": str(about["generation"]),
            "last-modified": formatdate(about["modified"], usegmt=True),
            "x-goog-stored-content-length": str(about["size"]),
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if self.command == "HEAD":
            self._answer(200, b"", {**headers, "content-length": str(about["size"])})
        elif asked is None:
            self._answer(200, bucket.read(key), headers)
        else:
            data = bucket.read(key)
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if first > last:
                raise Refused(416, "InvalidRange", "The requested range cannot be satisfied.")
            headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], headers)

    def _put(self, bucket: Bucket, _: str, key: str, body: bytes) -> None:
        if "uploadId" in self.query:
            tag = bucket.put_part(self.query["uploadId"], int(self.query["partNumber"]), body)
            self._answer(200, b"", {"etag": tag})
            return
        generation = self.headers.get("x-goog-if-generation-match")
        about = bucket.put(key, [body], _tag(body), len(body), generation)
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        headers = {"etag": about["etag"], "x-goog-generation": str(about["generation"])}
        self._answer(200, b"", {**headers, "x-goog-hash": f"md5={md5}"})

    def _post(self, bucket: Bucket, name: str, key: str, body: bytes) -> None:
        where = f"<Bucket>{name}</Bucket><Key>{escape(key)}</Key>"
        if "uploads" in self.query:
            upload = bucket.begin(key)
            self._document("InitiateMultipartUploadResult", f"{where}<UploadId>{upload}</UploadId>")
            return
        said = [
            (int(part.findtext("{*}PartNumber") or 0), part.findtext("{*}ETag") or "")
            for part in ET.fromstring(body).iterfind("{*}Part")
        ]
        about = bucket.complete(key, self.query["uploadId"], said)
        headers = {"x-goog-generation": str(about["generation"])}
        inside = f"{where}<ETag>{escape(about['etag'])}</ETag>"
        self._document("CompleteMultipartUploadResult", inside, headers)

    def _delete(self, bucket: Bucket, _: str, key: str, __: bytes) -> None:
        if "uploadId" in self.query:
            bucket.abort(self.query["uploadId"])
        else:
            bucket.delete(key)
        self._answer(204, b"", {})

    def _list(self, bucket: Bucket, name: str, _: str, __: bytes) -> None:
        assert self.query.get("list-type") == "2", self.query
        prefix = self.query.get("prefix", "")
        after = max(unquote(self.query.get("continuation-token", "")), self.query.get("start-after", ""))
        found = bucket.list(prefix, after)
        page = found[: int(self.query.get("max-keys", PAGE))]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Generation>{about['generation']}</Generation>"
            f"<MetaGeneration>1</MetaGeneration><LastModified>{_iso(about['modified'])}</LastModified>"
            f"<ETag>{escape(about['etag'])}</ETag><Size>{about['size']}</Size></Contents>"
            for key, about in page
        )
        more = len(page) < len(found)
        token = f"<NextContinuationToken>{quote(page[-1][0])}</NextContinuationToken>" if more else ""
        self._document(
            "ListBucketResult",
            f"<Name>{name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}",
        )

    def _document(self, kind: str, inside: str, headers: dict[str, str] | None = None) -> None:
        text = f"{_DECLARATION}<{kind} xmlns='{_NAMESPACE}'>{inside}</{kind}>"
        self._answer(200, text.encode(), {**_XML, **(headers or {})})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def _iso(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_s)) + f".{int(time_s * 1000) % 1000:03d}Z"


class Service(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, directory: Path, token: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.token = token
        self.buckets = {"tests": Bucket(directory / "tests")}

    def handle_error(self, *_: object) -> None:
        """A client that hung up."""


if __name__ == "__main__":
    Service(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).serve_forever()
