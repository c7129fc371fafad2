"""Weights by name: hf://, https:// and gs:// names become files in a local cache."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import posixpath
import re
import urllib.parse
from collections.abc import Collection, Mapping

from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import UserError, first_line
from pspnet_jax.weights import container, own
from pspnet_jax.weights.download import download, from_bucket, from_server

logger = logging.getLogger(__name__)
HUB = re.compile(r"hf://(?P<repo>[^/@:#?]+/[^/@:#?]+)(@(?P<revision>[^/@:]+))?(/(?P<file>[^:]+))?(?P<entry>:[^/:]+)?")
URL = re.compile(r"(?P<url>https?://[^/#]+/[^#]*?)(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?(?P<entry>:[\w.-]+)?")
# The first digits of the SHA-256, at the end of a name: a convention of torch.hub.load_state_dict_from_url. No dates.
CHECKSUM_IN_NAME = re.compile(r".*-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+")
SAFE = (".safetensors", ".safetensors.index.json")  # preferred, since such files hold nothing but arrays
STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = {"config.json", "preprocessor_config.json"}  # which describe the network of a weights file beside them
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
LOOPBACK = {"localhost", "127.0.0.1", "::1"}  # hosts whose answers nobody can alter on the way
MAX_LISTED = 12  # files in a message


def is_name(path: epath.PathLike) -> bool:
    """Returns whether this is a name that only `fetch` can read: hf:// or https://, not a local or gs:// path."""
    return os.fspath(path).startswith(("hf://", "https://", "http://"))


def stem(path: epath.PathLike) -> str:
    """Returns the last part of a path or name without its suffix, checksum and :ENTRY, as the name of a run."""
    return pathlib.PurePosixPath(os.fspath(path).partition("#sha256=")[0]).stem


def fetch(name: epath.PathLike) -> str:
    """Returns the local path of a weights file, after downloading it to a cache if it is not there.

    Args:
      name: a local path, or that of a run on gs://, which are returned unchanged; a gs:// file, or a gs:// folder with
        model.safetensors; hf://USER/REPO[@REVISION][/FILE], from the Hugging Face hub (HF_ENDPOINT, HF_HOME and HF_TOKEN
        apply); or https://HOST/FILE#sha256=DIGITS, where a FILE named NAME-DIGITS.pth needs no further checksum. :ENTRY may
        follow the name of a file, see `container.read`.

    Returns:
      The path in the cache, with :ENTRY if given. Beside it are the other shards of an index, and a repository's SETTINGS.

    Raises:
      UserError: the name is wrong, the file cannot be reached, read or stored, or its checksum differs.
    """
    text = os.fspath(name)
    for prefix, source in SOURCES.items():
        if text.startswith(prefix):
            return source(text)
    return text


def _cache(*key: object) -> pathlib.Path:
    """Returns a directory for one version of a remote file."""
    if not (cache := files.user_cache()).is_absolute():
        raise UserError("no home directory is known to keep downloads in; set XDG_CACHE_HOME to a directory")
    return cache / "weights" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _from_server(name: str) -> str:
    expected = "expected https://HOST/FILE#sha256=DIGITS with the 64 digits of its SHA-256 checksum"
    if not (match := URL.fullmatch(name)) or not (file := _last_part(match["url"])):
        raise UserError(f"{name}: {expected}")
    if not (checksum := (match["sha256"] or "").lower()):
        if not (found := CHECKSUM_IN_NAME.fullmatch(file)):
            hint = f"{expected}, or a file name with its first 8 digits, such as resnet50-0676ba61.pth"
            if urllib.parse.urlsplit(match["url"]).hostname == "huggingface.co":
                hint = "name files on the hub as hf://USER/REPO/FILE"
            raise UserError(f"{name}: has no checksum, so it was not downloaded; {hint}")
        if name.startswith("http://") and urllib.parse.urlsplit(match["url"]).hostname not in LOOPBACK:
            raise UserError(f"{name}: http:// needs the whole checksum, as others can alter the file on the way; {expected}")
        checksum = found[1]
    if file.endswith((".index", ".index.json")):
        raise UserError(f"{name}: is only the index of several files; download them all, and name the local index")
    target = _cache(match["url"], checksum) / file
    download(name, target, from_server(name, match["url"]), checksum)
    return f"{target}{match['entry'] or ''}"


def _last_part(url: str) -> str:
    with contextlib.suppress(ValueError):  # such as an invalid IPv6 address
        file = posixpath.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).replace("\0", "")
        return "" if file in (".", "..") else file
    return ""


def _from_bucket(name: str) -> str:
    path, entry = container.split_entry(files.user_path(name))
    path = path / own.WEIGHTS if own.is_folder(path) else path
    if not path.is_file():
        return name
    parts = [path]
    if path.name == own.WEIGHTS or path.name.endswith((".index", ".index.json")):
        siblings = {sibling.name for sibling in path.parent.iterdir()}
        parts += [path.parent / part for part in (*_shards(name, path, siblings), *sorted(SETTINGS & siblings))]
    version = [(os.fspath(part), stat.length, stat.mtime) for part in parts if (stat := part.stat())]
    target = _cache(version) / path.name
    for part, (_, size, _) in reversed(list(zip(parts, version, strict=True))):
        download(os.fspath(part), target.with_name(part.name), from_bucket(part, size))
    return f"{target}:{entry}" if entry else os.fspath(target)


def _from_hub(name: str) -> str:
    from huggingface_hub import constants, errors

    if not (match := HUB.fullmatch(name)):
        raise UserError(f"{name}: expected hf://USER/REPO, hf://USER/REPO@REVISION or hf://USER/REPO/FILE")
    repo, revision = match["repo"], urllib.parse.unquote(match["revision"] or "main")
    try:
        local = _download_from_hub(name, repo, revision, match["file"])
    except UserError:
        raise
    # OSError includes the hub's own; HTTPError is that of its client, which is another in each version.
    except (OSError, errors.HTTPError, errors.HFValidationError, json.JSONDecodeError) as error:
        if sentence := _hub_problem(error, repo, revision):
            raise UserError(f"{name}: {sentence}") from error
        reason, cache = first_line(error), constants.HF_HUB_CACHE
        if not (cached := _cached(repo, revision)):
            raise UserError(
                f"{name}: the hub cannot be reached ({reason}), and {cache} has no copy; check the network"
            ) from error
        try:
            local = cached[_choose(name, repo, cached, match["file"])]
        except UserError as problem:
            raise UserError(f"{problem} in {cache}; the hub cannot be reached ({reason})") from error
        logger.warning(f"{name}: the hub cannot be reached ({reason}); using the copy {local}")
    return f"{local}{match['entry'] or ''}"


def _download_from_hub(name: str, repo: str, revision: str, given: str | None) -> str:
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(repo, revision=revision)
    listing, commit = [sibling.rfilename for sibling in info.siblings or ()], info.sha or revision
    path = _choose(name, repo, listing, given)
    local = _hub_file(repo, revision, commit, path)
    folder = posixpath.dirname(path)
    siblings = [posixpath.basename(other) for other in listing if posixpath.dirname(other) == folder]
    for other in (*_shards(name, epath.Path(local), siblings), *sorted(SETTINGS & {*siblings})):
        _hub_file(repo, revision, commit, posixpath.join(folder, other))
    return local


def _shards(name: str, path: epath.Path, siblings: Collection[str]) -> list[str]:
    """Returns the other files that belong to a local index. All of them are among its siblings where it comes from."""
    names = container.shards(path, siblings)
    if missing := [shard for shard in names if shard not in siblings]:
        shown = ", ".join(missing[:MAX_LISTED]) + ", ..." * (len(missing) > MAX_LISTED)
        raise UserError(f"{name}: lacks {len(missing)} of the {len(names)} shards in {path.name}: {shown}; ask its authors")
    return names


def _hub_problem(error: Exception, repo: str, revision: str) -> str:
    """Returns what the user can do about an error of the hub's client; "" if the hub could not be reached."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    match error:
        case errors.HFValidationError():
            return f"is not the name of a repository ({first_line(error)})"
        case errors.GatedRepoError():
            return f"its authors have to grant access: ask for it at {constants.ENDPOINT}/{repo}, and {LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"there is no such repository, or it is private: check the name, or {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {revision!r}; use a branch, a tag or a commit"
        case errors.RemoteEntryNotFoundError():
            return f"the hub lists {error.response.url}, but does not have it; try again later, or name another revision"
        case _ if status in (401, 403):
            return f"the hub denies access (status {status}); {LOG_IN}"
        case OSError() if error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}); free some space, or set HF_HOME"
    return ""


def _choose(name: str, repo: str, listing: Collection[str], given: str | None) -> str:
    """Returns the file that the name means: the given one, or the only one with weights."""
    shown = ", ".join(sorted(listing)[:MAX_LISTED]) + ", ..." * (len(listing) > MAX_LISTED)
    if given:
        if given not in listing:
            raise UserError(f"{name}: the repository has no file {given}; it has {shown or 'no files'}")
        return given
    found = [
        file for file in listing if file.endswith(container.ENDINGS) and not container.SHARD.fullmatch(posixpath.basename(file))
    ]
    found = [file for file in found if file.endswith(SAFE)] or found
    found = [file for file in STANDARD if file in found][:1] or found
    if not found:
        raise UserError(
            f"{name}: has no weights that can be read ({', '.join(container.ENDINGS)}); it has {shown or 'no files'}"
        )
    if len(found) > 1:
        raise UserError(f"{name}: has several files with weights; name one, such as hf://{repo}/{found[0]}: {', '.join(found)}")
    return found[0]


def _hub_file(repo: str, revision: str, commit: str, file: str) -> str:
    """Returns the path of a file in the hub's cache, whose layout its documentation describes.

    The hub's own client starts an interrupted download anew. So large files, whose ETag is their SHA-256, are downloaded here
    to where the client looks for them.
    """
    import huggingface_hub
    from huggingface_hub import constants, utils

    api = huggingface_hub.HfApi()
    url, etag = huggingface_hub.hf_hub_url(repo, file, revision=commit), ""
    found = huggingface_hub.try_to_load_from_cache(repo, file, revision=commit)
    if not isinstance(found, str):
        etag = api.get_hf_file_metadata(url=url).etag or ""
    if re.fullmatch("[0-9a-f]{64}", etag):
        cache, folder = pathlib.Path(constants.HF_HUB_CACHE), f"models--{repo.replace('/', '--')}"
        token = utils.build_hf_headers().get("authorization", "")
        lock = cache / ".locks" / folder / f"{etag}.lock"  # the client's own
        shown = f"hf://{repo}/{file}"
        download(shown, cache / folder / "blobs" / etag, from_server(shown, url, token), etag, lock)
    try:
        return api.hf_hub_download(repo, file, revision=revision)  # records in the cache which commit the revision is
    except OSError:  # perhaps the cache cannot be written
        if isinstance(found, str):
            return found
        raise


def _cached(repo: str, revision: str) -> Mapping[str, str]:
    """Returns the cached files of a repository at a revision: their names there and their local paths."""
    import huggingface_hub
    from huggingface_hub import constants

    with contextlib.suppress(huggingface_hub.CacheNotFound):
        repos = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
        versions = (v for r in repos if (r.repo_id, r.repo_type) == (repo, "model") for v in r.revisions)
        for version in versions:
            if revision == version.commit_hash or revision in version.refs:
                paths = [file.file_path for file in version.files]
                return {path.relative_to(version.snapshot_path).as_posix(): str(path) for path in paths}
    return {}


SOURCES = {"hf://": _from_hub, "https://": _from_server, "http://": _from_server, "gs://": _from_bucket}
