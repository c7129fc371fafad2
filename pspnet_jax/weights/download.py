"""Downloads files in a way that survives interruptions: a download is continued, verified, and given its name at the end."""

import contextlib
import hashlib
import http.client
import io
import logging
import os
import pathlib
import secrets
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import filelock
from etils import epath

import pspnet_jax
from pspnet_jax import files
from pspnet_jax.errors import UserError, first_line
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
CHUNK = 2**20  # bytes
TIMEOUT = 30  # seconds without an answer or data
PATIENCE = 5  # seconds until the user learns what is waited for
PAUSES = (1, 2, 4, 8)  # seconds before a dropped connection is opened again; started anew whenever data has arrived
MB = 1e6
SPACE = "free some space, or set XDG_CACHE_HOME and HF_HOME to another place"
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP statuses after which another attempt may succeed
ADVICE = {401: "it needs a login", 403: "you have no access", 404: "check the name", 429: "wait a while, and try again"}


class Stream(NamedTuple):
    """A remote file from its byte `start` on."""

    file: BinaryIO
    start: int
    size: int  # of the whole file, in bytes; 0 if unknown


class UnreachableError(UserError):
    """A remote file cannot be opened at the moment."""

    def __init__(self, name: str, reason: str, advice: str):
        super().__init__(f"{name}: {reason}; {advice}")
        self.reason = reason


# Opens a remote file at the first byte that is missing; a server that cannot resume starts at 0. Raises UnreachableError.
OpenAt = Callable[[int], contextlib.AbstractContextManager[Stream]]


def download(name: str, target: pathlib.Path, open_at: OpenAt, sha256: str = "", lock: pathlib.Path | None = None) -> None:
    """Writes a remote file to `target`, unless it is there. The missing rest of an earlier attempt is all that is downloaded.

    Args:
      name: what the user calls the file, for messages.
      target: what has arrived so far is in `target`.incomplete, beside it.
      open_at: opens the remote file.
      sha256: the checksum in hexadecimal, or its first digits; "": not known.
      lock: file that keeps several processes from downloading it at the same time; by default, `target`.lock.

    Raises:
      UserError: the file cannot be reached or written, or has another checksum; what has arrived is kept unless it is wrong.
    """
    lock = lock or target.with_name(f"{target.name}.lock")
    with files.writing(target.parent, SPACE):
        if target.exists():  # perhaps in a cache that cannot be written
            return
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone(name, lock) as alone:
            part = target.with_name(f"{target.name}{'' if alone else f'.{secrets.token_hex(4)}'}.incomplete")
            while not target.exists():
                resumed = part.exists() and part.stat().st_size > 0
                _receive(name, part, open_at)
                with part.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found.startswith(sha256.lower()):
                    part.replace(target)
                    continue
                part.unlink()
                if not resumed:  # otherwise, the file may have been replaced since the first part arrived
                    raise UserError(
                        f"{name}: has the SHA-256 {found}, not {sha256}, so it was deleted; check the name and the checksum"
                    )


@contextlib.contextmanager
def _alone(name: str, lock: pathlib.Path) -> Iterator[bool]:
    """Waits until no other process holds the lock. Yields False where the file system has no locks."""
    held = filelock.FileLock(lock)
    try:
        try:
            held.acquire(timeout=PATIENCE)
        except filelock.Timeout:
            logger.info(f"{name}: another process is downloading it; waiting until it is done")
            held.acquire()
    except NotImplementedError:  # such as Lustre, as it is often mounted
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def _receive(name: str, part: pathlib.Path, open_at: OpenAt) -> None:
    """Appends to `part` what it lacks of the remote file, and opens a dropped connection again."""
    pauses, size = iter(PAUSES), 0
    with part.open("ab") as out:
        while True:
            done = out.tell()
            try:
                with open_at(done) as stream:
                    if stream.start != done:
                        done = out.truncate(out.seek(0))
                    size = stream.size
                    reason = _append(name, out, stream, done)
            except UnreachableError as error:
                if not done:
                    raise
                reason = error.reason
            if not reason:
                return
            if out.tell() > done:
                pauses = iter(PAUSES)
            if (pause := next(pauses, None)) is None:
                so_far = f"{out.tell() / MB:.0f}{f' of {size / MB:.0f}' if size else ''} MB"
                kept = "what has arrived is kept: run the command again to continue it"
                raise UserError(f"{name}: the download stopped after {so_far} ({reason}); {kept}")
            logger.warning(f"{name}: the connection was lost ({reason}); continuing in {pause} s")
            time.sleep(pause)


def _append(name: str, out: BinaryIO, stream: Stream, done: int) -> str:
    """Writes the stream to the file. Returns why it ended early, or "" if it is complete."""
    free, missing = shutil.disk_usage(out.fileno()).free, stream.size - done
    if missing > free:
        raise UserError(
            f"{name}: needs {missing / MB:.0f} MB, but only {free / MB:.0f} MB are free in {pathlib.Path(out.name).parent}; "
            f"{SPACE}"
        )
    if missing > 0:
        here = f", of which {done / MB:.1f} MB are here" if done else ""
        logger.info(f"downloading {name}: {stream.size / MB:.1f} MB{here}")
    shown = (
        progress("downloading", missing / MB, "MB", every_process=True)
        if missing > 0
        else contextlib.nullcontext(lambda size: None)
    )
    with shown as advance:
        while True:
            try:
                chunk = stream.file.read(CHUNK)
            except Exception as error:  # of the connection; for a bucket, TensorFlow's and gcsfs' are no OSError
                return first_line(error)
            if not chunk:
                break
            out.write(chunk)
            advance(len(chunk) / MB)
    return "" if out.tell() == stream.size or not stream.size else "the server closed the connection"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Authorizes requests that stay on the same server, as for a repository that was renamed; refuses to leave https."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args)
        if new and req.type == "https" and new.type != "https":  # others could alter the file on the way
            raise UserError(
                f"{req.full_url}: the server sends on to {new.full_url}, which is not encrypted; name another server"
            )
        same = new and urllib.parse.urlsplit(new.full_url)[:2] == urllib.parse.urlsplit(req.full_url)[:2]
        if new and same and (authorization := req.unredirected_hdrs.get("Authorization")):
            new.add_unredirected_header("Authorization", authorization)
        return new


def from_server(name: str, url: str, authorization: str = "") -> OpenAt:
    """Returns an opener of a URL. An `authorization` is not sent to other servers that it redirects to."""

    @contextlib.contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        request = urllib.request.Request(url, headers={"User-Agent": f"pspnet_jax/{pspnet_jax.__version__}"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if authorization:
            request.add_unredirected_header("Authorization", authorization)
        try:
            response = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
                yield Stream(io.BytesIO(), start, start)  # nothing is missing
                return
            if error.code == 416 and start:  # the file is shorter now
                with open_at(0) as stream:
                    yield stream
                return
            advice = ADVICE.get(error.code, "try again later")
            answer = f"the server answers {error.code} {error.reason}"
            if error.code in PASSING:
                raise UnreachableError(name, answer, advice) from error
            raise UserError(f"{name}: {answer}; {advice}") from error
        except UserError:  # of `_Redirects`
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", "") or error
            raise UnreachableError(name, f"cannot be reached ({reason})", "check the network and the name") from error
        with response:
            size, start = int(response.headers.get("Content-Length") or 0), start if response.status == 206 else 0
            yield Stream(response, start, size and start + size)

    return open_at


def from_bucket(path: epath.Path, size: int) -> OpenAt:
    """Returns an opener of a gs:// path of this size."""

    @contextlib.contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
                file.seek(start)
            except Exception as error:  # TensorFlow's or gcsfs'
                raise UnreachableError(os.fspath(path), f"cannot be read ({first_line(error)})", "try again later") from error
            yield Stream(file, start, size)

    return open_at
