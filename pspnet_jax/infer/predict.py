"""Predicts image files; reads ahead and writes results while the devices compute.

With several processes, each predicts a share of the images on its own devices, with programs of its own.
"""

import collections
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin

from pspnet_jax import files, image_files, parallel
from pspnet_jax.errors import UserError, grouped
from pspnet_jax.infer import large, submission
from pspnet_jax.infer.draw import save
from pspnet_jax.infer.predictor import Example, Predictor
from pspnet_jax.infer.segmenter import AHEAD, THREADS, Result, Segmenter, ahead
from pspnet_jax.large_files import read_description
from pspnet_jax.lock import locked
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
ORIGIN = ".origin.json"  # file in the output that records how its results were made
MAPS = {"confidence": "png", "probabilities": "npy"}  # maps that can be written: their folders and suffixes
SIGNATURE = "pspnet_jax"  # PNG text key of a result's signature
# Errors that would occur for the next image, too: no space, no permission, or a disk that fails or is gone.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ESTALE)
MAX_JPEG = 65500  # pixels of a side
FAILED = "failed.txt"  # file in the output that lists the images that could not be predicted


def predict(
    segmenter: Segmenter,
    images: Mapping[str, epath.PathLike],
    output: epath.PathLike,
    server_format: str = "",
    skip_existing: bool = False,
    origin: Mapping[str, Any] | None = None,
    maps: Sequence[str] = (),
) -> None:
    """Predicts images, each at its own size. With several processes, all pass the same images and share the work.

    Writes output/index/NAME.png (gray, the values are class indices), output/color/NAME.png (the same values with a palette of
    class colors) and output/overlay/NAME.jpg (half color, half image); of a TIFF that is too large to read as a whole, see
    large.py, output/index/NAME.tif and a reduced overlay; or, if `server_format` is given, only the submission.

    Args:
      segmenter: predicts on devices of this process.
      images: files keyed by the names of their results, see `inputs.find_images`.
      output: a folder, created if missing.
      server_format: "cityscapes", "ade20k" or "voc" for a submission to that benchmark's server.
      skip_existing: skips images that already have all their results, to continue an interrupted run.
      origin: identifies the weights and the images, such as the run, its step and the "input"; saved with the settings in
        output/.origin.json.
      maps: "confidence" also writes output/confidence/NAME.png, 16-bit, the probability of the predicted class times 65535, and
        "probabilities" output/probabilities/NAME.npy, float16[H, W, K]. The network is run once more for the maps of an image,
        whose probabilities take 10 * H * W * K bytes of memory, one image after the other.

    Raises:
      UserError: the network's classes do not fit the submission, or `maps` is given with one; the output cannot be written to,
        is not shared by all processes, has files that would be overwritten, or, with `skip_existing`, has results of another
        origin; the processes differ in images or settings; or, raised when all others are done, some images could not be
        predicted.
    """
    with parallel.fail_together("preparing the prediction"):
        if server_format and maps:
            raise UserError("--maps: a submission to a benchmark's server has none; leave out --maps or --format")
        server, output = submission.choose(server_format, segmenter.info) if server_format else None, files.absolute(output)
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: is a file; expected a folder, which is created if missing")
    settings = {
        **segmenter.predictor.description,
        "format": server_format,
        "weights": parallel.checksum(segmenter.variables),
        **({} if server_format else {"colors": [*map(list, segmenter.info.colors)]}),
        **({"maps": [*maps]} if maps else {}),
    }
    parallel.require_same({**settings, "images": len(images), "their names": [*images], "skip_existing": skip_existing})
    origin = next(iter(parallel.exchange({**(origin or {}), **settings}).values()))  # the paths may differ
    share = dict(itertools.islice(images.items(), jax.process_index(), None, jax.process_count()))
    results = {name: _result_paths(output, name, path, server, maps) for name, path in share.items()}
    with locked(output):
        with parallel.fail_together("preparing the output"):
            _refuse_overwriting(results, images, output, origin)
        with parallel.fail_together("preparing the output"):
            if jax.process_index() == 0:
                _write_origin(output, origin, skip_existing)
        began = time.perf_counter()
        with parallel.fail_together("predicting"):
            mine = _predict_share(segmenter, share, results, server, skip_existing, origin)
        outcomes = [*parallel.exchange(mine).values()]
    existing, done = (sum(outcome[count] for outcome in outcomes) for count in ("existing", "done"))
    failed = [line for outcome in outcomes for line in outcome["failed"]]
    listed = failed if jax.process_index() == 0 else []
    kept = f"{existing + done} of {len(images)} images have their results in {output}"
    if stopped_by := next(filter(None, (outcome["stopped_by"] for outcome in outcomes)), ""):
        raise UserError("\n".join((*listed, f"{output}: {stopped_by}; {kept}, and --skip_existing continues from there")))
    rate = done / (time.perf_counter() - began)
    logger.info(f"{kept}, {existing} from earlier runs; {rate:.3g} images/s on {segmenter.predictor.device}, including I/O")
    if failed:
        if listed:
            with files.writing(output, f"{FAILED} is missing"), files.atomic(output / FAILED) as path:
                path.write_text("".join(f"{line}\n" for line in listed))
        summary = f"{len(failed)} of {len(images)} images could not be predicted, see {output / FAILED}"
        raise UserError("\n".join((*grouped(listed), summary)))
    if jax.process_index() == 0:
        (output / FAILED).unlink(missing_ok=True)


def _predict_share(
    segmenter: Segmenter,
    images: Mapping[str, epath.PathLike],
    results: Mapping[str, Sequence[epath.Path]],
    server: submission.Submission | None,
    skip_existing: bool,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """Predicts this process's images and writes their results, given the paths of the results.

    Returns:
      The numbers of images that had results ("existing") and that have them now ("done"), a message for each that "failed", and
      "stopped_by", why no more could be written, or "".
    """
    sign = functools.partial(_signature, origin)
    todo = _without_results(images, results, sign) if skip_existing else images
    in_blocks = {name: path for name, path in todo.items() if results[name][0].suffix == ".tif"}
    whole = _by_size({name: path for name, path in todo.items() if name not in in_blocks}, segmenter.predictor)
    with ThreadPoolExecutor(THREADS) as pool, progress("predicting", len(todo)) as advance:
        io = _FileIO(pool, advance)
        examples = io.read(whole, segmenter.predictor, sign)
        for result in segmenter.results(examples, lambda example, error: io.fail(f"{example['name']}: {error}")):
            io.write(results[result.example["name"]], result, server)
            if "maps" in origin:  # one image at a time, because their probabilities are large
                io.wait()
            if io.stopped_by:
                break
        io.wait()
    for name, path in in_blocks.items():
        if io.stopped_by:
            break
        if "maps" in origin:
            io.fail(f"{path}: maps are not written of TIFFs that are predicted in blocks; cut it into smaller images")
        else:
            io.complete(name, functools.partial(large.predict, segmenter, path, results[name], sign(path)))
    return {"existing": len(images) - len(todo), "done": io.done, "failed": io.failed, "stopped_by": io.stopped_by}


class _FileIO:
    """Reads images and writes results in threads, with bounded queues, and counts what is done and what failed."""

    def __init__(self, pool: ThreadPoolExecutor, advance: Callable[[int], None]):
        self._pool, self._advance = pool, advance
        self._writing: collections.deque[tuple[str, Future]] = collections.deque()
        self.done = 0  # number of images whose results are written
        self.failed = list[str]()  # one line for each image that failed, with the reason
        self.stopped_by = ""  # the error that prevents all further writing, or ""

    def read(
        self, paths: Mapping[str, epath.PathLike], predictor: Predictor, sign: Callable[[epath.PathLike], str]
    ) -> Iterator[Example]:
        """Yields the images that can be read and pass the check, in order, with their signatures; records others as failed."""

        def read_one(item: tuple[str, epath.PathLike]) -> Example:
            name, path = item
            try:
                signature = sign(path)
                predictor.check(image := image_files.read(path, predictor.pixel_format))
            except Exception as error:  # decoders raise many types
                reason = str(error) or type(error).__name__
                raise UserError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from error
            return {"name": name, "image": image, "signature": signature}

        for _, reading in ahead(self._pool, read_one, paths.items()):
            try:
                yield reading.result()
            except UserError as error:
                self.fail(str(error))

    def write(self, results: Sequence[epath.Path], result: Result, server: submission.Submission | None) -> None:
        """Queues an image's results for writing, and waits if too many are queued."""
        self._writing.append((result.example["name"], self._pool.submit(_write, results, result, server)))
        self.wait(AHEAD)

    def wait(self, max_queued: int = 0) -> None:
        while len(self._writing) > max_queued:
            name, future = self._writing.popleft()
            self.complete(name, future.result)

    def complete(self, name: str, write: Callable[[], None]) -> None:
        """Calls the function that writes the last of an image's results."""
        try:
            write()
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                self.stopped_by = str(error)
            else:
                self.fail(f"{name}: {error}")
        else:
            self.done += 1
            self._advance(1)

    def fail(self, reason: str) -> None:
        self.failed.append(reason)
        self._advance(1)


def _result_paths(
    output: epath.Path, name: str, image: epath.PathLike, server: submission.Submission | None, maps: Sequence[str]
) -> list[epath.Path]:
    if server:
        return [output / server.folder / f"{name}.png"]
    if large.needs_blocks(image):
        return large.result_paths(output, name)
    kinds = {"index": "png", "color": "png", "overlay": "jpg"} | {kind: MAPS[kind] for kind in maps}
    return [output / kind / f"{name}.{suffix}" for kind, suffix in kinds.items()]


def _signature(origin: Mapping[str, Any], image: epath.PathLike) -> str:
    """Returns a hash of the origin and of the image file's size and time, which identifies the image's results."""
    made_with = {key: value for key, value in origin.items() if key != "input"}
    try:
        stat = epath.Path(image).stat()
        size_and_time = stat.length, stat.mtime
    except OSError:  # reported when the image is read
        size_and_time = 0, 0
    return hashlib.sha256(json.dumps([made_with, size_and_time]).encode()).hexdigest()[:32]


def _without_results(
    images: Mapping[str, epath.PathLike], results: Mapping[str, Sequence[epath.Path]], sign: Callable[[epath.PathLike], str]
) -> dict[str, epath.PathLike]:
    """Returns the images that do not have all their results yet."""
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(lambda name: _is_done(results[name], sign(images[name])), images)
        return {name: path for (name, path), is_done in zip(images.items(), done, strict=True) if not is_done}


def _is_done(results: Sequence[epath.Path], signature: str) -> bool:
    """Returns whether all results of an image exist, and the first, which is written last, has this signature."""
    try:
        for path in results[1:]:
            with path.open("rb") as file:
                np.lib.format.read_magic(file) if path.suffix == ".npy" else Image.open(file)
        if results[0].suffix == ".tif":
            return read_description(results[0]) == signature
        with results[0].open("rb") as file, Image.open(file) as image:
            image.load()
            return image.info.get(SIGNATURE) == signature
    except Exception:  # missing, or damaged, for which Pillow raises many types
        return False


def _write(results: Sequence[epath.Path], result: Result, server: submission.Submission | None) -> None:
    label, signed = result.labels, PngImagePlugin.PngInfo()
    signed.add_text(SIGNATURE, result.example["signature"])
    if folders := [str(path) for path in results if path.is_dir()]:
        raise UserError(f"{', '.join(folders)}: is a folder where a result should be; move it away")
    if server:
        return save(server.encode(label), results[0], pnginfo=signed)
    index, color, mixed, *maps = results
    if maps:
        _write_maps(maps, result.probabilities())  # another pass through the network
    result.save(color)
    overlay = result.overlay()
    overlay.thumbnail((MAX_JPEG, MAX_JPEG))
    save(overlay, mixed, "JPEG", quality=95, subsampling=0)  # crisp edges
    save(Image.fromarray(label), index, pnginfo=signed)  # written last: if it exists, so do the others


def _write_maps(paths: Sequence[epath.Path], probabilities: np.ndarray) -> None:
    for path in paths:
        if path.suffix == ".png":
            save(Image.fromarray(np.rint(probabilities.max(-1) * 65535).astype(np.uint16)), path)
        else:
            with files.atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, probabilities.astype(np.float16))


def _refuse_overwriting(
    results: Mapping[str, Sequence[epath.Path]],
    images: Mapping[str, epath.PathLike],
    output: epath.Path,
    origin: Mapping[str, Any],
) -> None:
    """Refuses to overwrite an input image, results of another input, or files that no prediction wrote."""
    inputs, before = {os.path.realpath(path) for path in images.values()}, files.read_json(output / ORIGIN)
    foreign = output.is_dir() and (not before or before.get("input") != origin.get("input"))
    if not before and (output / FAILED).exists():
        raise UserError(f"{output / FAILED}: was not written by a prediction, and would be replaced; choose another --output")
    for path in itertools.chain.from_iterable(results.values()):
        if os.path.realpath(path) in inputs or (foreign and path.is_file()):
            raise UserError(f"{path}: already exists and was not predicted from this input; choose another --output")


def _write_origin(output: epath.Path, origin: Mapping[str, Any], continued: bool) -> None:
    """Writes .origin.json before anything is computed; refuses to continue results of another origin."""
    path, mine = output / ORIGIN, json.loads(json.dumps(origin))
    before = files.read_json(path) if continued and path.exists() else mine
    if before != mine and {**before, "input": mine.get("input")} == mine:
        raise UserError(
            f"--output {output}: has the results of another --input, {before.get('input')}; choose another --output"
        )
    if before != mine:
        raise UserError(
            f"--output {output}: its results come from another checkpoint or other settings ({path}); omit --skip_existing "
            "to replace them, or choose another --output"
        )
    with files.writing(output, "nothing was predicted"), files.atomic(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=2) + "\n")


def _by_size(paths: Mapping[str, epath.PathLike], predictor: Predictor) -> Mapping[str, epath.PathLike]:
    """Orders files for whole-image inference, which compiles the network once for each size, and logs the number of sizes."""
    if predictor.settings.inference != "whole":
        return paths
    sizes = dict(zip(paths, image_files.sizes(list(paths.values())), strict=True))
    predictor.log_compilations(sizes.values())
    return {name: paths[name] for name in sorted(paths, key=sizes.__getitem__)}
