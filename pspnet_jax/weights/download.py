"""Downloads files in a way that survives interruptions: a download is continued, verified, and given its name at the end."""

import contextlib
import hashlib
import http.client
import io
import logging
import pathlib
import secrets
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import filelock
from etils import epath

import pspnet_jax
from pspnet_jax import files
from pspnet_jax.errors import UserError
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
CHUNK = 2**20  # bytes
TIMEOUT = 30  # seconds without an answer or data
PAUSES = (1, 2, 4, 8)  # seconds before a dropped connection is opened again; started anew whenever data has arrived
MB = 1e6
SPACE = "free some space, or set XDG_CACHE_HOME and HF_HOME to another place"
ADVICE = {401: "it needs a login", 403: "you have no access", 404: "check the name", 429: "wait a while, and try again"}


class Stream(NamedTuple):
    """A remote file from its byte `start` on."""

    file: BinaryIO
    start: int
    size: int  # of the whole file, in bytes; 0 if unknown


# Opens a remote file at the first byte that is missing; a server that cannot resume starts at 0.
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
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone(lock) as alone:
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
def _alone(lock: pathlib.Path) -> Iterator[bool]:
    """Waits until no other process holds the lock. Yields False where the file system has no locks."""
    held = filelock.FileLock(lock)
    try:
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
    pauses = iter(PAUSES)
    with part.open("ab") as out:
        while True:
            done = out.tell()
            with open_at(done) as stream:
                if stream.start != done:
                    done = out.truncate(out.seek(0))
                reason = _append(name, out, stream, done)
            if not reason:
                return
            if out.tell() > done:
                pauses = iter(PAUSES)
            if (pause := next(pauses, None)) is None:
                so_far = f"{out.tell() / MB:.0f} of {stream.size / MB:.0f} MB"
                raise UserError(f"{name}: the download stopped after {so_far} ({reason}); run the command again to continue it")
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
    shown = progress("downloading", missing / MB, "MB") if missing > 0 else contextlib.nullcontext(lambda size: None)
    with shown as advance:
        while True:
            try:
                chunk = stream.file.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                return str(error) or type(error).__name__
            if not chunk:
                break
            out.write(chunk)
            advance(len(chunk) / MB)
    return "" if out.tell() == stream.size or not stream.size else "the server closed the connection"


def from_server(name: str, url: str, private: Mapping[str, str] | None = None) -> OpenAt:
    """Returns an opener of a URL. `private` headers are not sent to the hosts that it may redirect to."""

    @contextlib.contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        request = urllib.request.Request(url, headers={"User-Agent": f"pspnet_jax/{pspnet_jax.__version__}"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        for header, value in (private or {}).items():
            request.add_unredirected_header(header, value)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
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
            raise UserError(f"{name}: the server answers {error.code} {error.reason}; {advice}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", "") or error
            raise UserError(f"{name}: cannot be reached ({reason}); check the network and the name") from error
        with response:
            size, start = int(response.headers.get("Content-Length") or 0), start if response.status == 206 else 0
            yield Stream(response, start, size and start + size)

    return open_at


def from_bucket(path: epath.Path, size: int) -> OpenAt:
    """Returns an opener of a gs:// path of this size."""

    @contextlib.contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        with path.open("rb") as file:
            file.seek(start)
            yield Stream(file, start, size)

    return open_at
