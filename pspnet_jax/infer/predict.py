"""Predicts images that need no labels: files are read ahead, and results written, while the devices compute."""

import collections
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin

from pspnet_jax import files, image_files
from pspnet_jax.datasets import IGNORE, DatasetInfo
from pspnet_jax.errors import UserError
from pspnet_jax.infer import memory, submission
from pspnet_jax.infer.draw import overlay, palette_image, save
from pspnet_jax.infer.predictor import Example, Predictor
from pspnet_jax.lock import locked
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
THREADS = 2 + (os.cpu_count() or 1)
AHEAD = 2 * THREADS  # images that are read before they are needed, and results that may wait to be written
ORIGIN = ".origin.json"  # in the output: what its results were made with
SIGNATURE = "pspnet_jax"  # names the text in a result by which it is known again
OF_ONE_FILE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)  # the next image would meet any other error, too


def predict(
    predictor: Predictor,
    variables: Any,
    images: Mapping[str, epath.PathLike],
    output: epath.PathLike,
    info: DatasetInfo,
    form: str = "",
    skip_existing: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Predicts images, each at its own size.

    Writes output/index/NAME.png (gray, the values are class indices), output/color/NAME.png (the same in a palette of the
    classes' colors) and output/overlay/NAME.jpg (half color, half image); or, given a form, only what that server takes.

    Args:
      predictor: for the classes of `info`.
      variables: weights, see `Predictor.place`.
      images: files by the names that results get, see `inputs.find_images`.
      output: a folder, made if need be.
      info: the classes.
      form: "cityscapes", "ade20k" or "voc" for a submission to the benchmark's server.
      skip_existing: leaves out images whose results are all there, to go on with a long job.
      origin: what the weights and the images are, such as the run, its step and the "input"; kept in output/.origin.json
        with the settings.

    Raises:
      UserError: the form is of other classes; the output cannot be written to, or is to be continued with another origin; or,
        when all others have their results, some images could not be predicted: which, and why.
    """
    server, output = submission.choose(form, info) if form else None, files.absolute(output)
    results = {name: _results(output, name, server) for name in images}
    origin = {**(origin or {}), **predictor.description, "format": form, "weights": _digest(variables)}
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; expected a folder, which is made if need be")
    with locked(output):
        _keep_others(results, images, output, origin)
        _write_origin(output, origin, skip_existing)
        signatures = {name: _signature(origin, path) for name, path in images.items()}
        done = {name for name in images if skip_existing and _is_done(results[name], signatures[name])}
        todo = _by_size({name: path for name, path in images.items() if name not in done}, predictor)
        began, variables = time.perf_counter(), predictor.place(variables)
        with ThreadPoolExecutor(THREADS) as pool, progress("predicting", len(todo)) as advance:
            job = _Job(pool, advance)
            for group in predictor.groups(job.read(todo, predictor.check)):
                for example, labels, i in _labeled(group, predictor, variables, job.fail):
                    name, image = example["name"], example["image"]
                    find = functools.partial(_labels, labels, i, image, predictor.settings)
                    job.write(name, _write, results[name], signatures[name], image, find, info, server)
                if job.stopped_by:
                    break
            job.wait()
    existing = len(images) - len(todo)
    kept = f"{existing + job.done} of {len(images)} images have their results in {output}"
    if job.stopped_by:
        raise UserError(
            "\n".join((*job.failed, f"{output}: {job.stopped_by}; {kept}, and --skip_existing continues from there"))
        )
    rate = job.done / (time.perf_counter() - began)
    logger.info(f"{kept}, {existing} from before; {rate:.3g} images/s on {predictor.device}, reading and writing included")
    if job.failed:
        raise UserError("\n".join((*job.failed, f"{len(job.failed)} of {len(images)} images could not be predicted")))


def _labeled(
    group: Sequence[Example], predictor: Predictor, variables: Any, fail: Callable[[str], None]
) -> list[tuple[Example, jax.Array, int]]:
    """Returns examples with labels uint8[M, S, T] on the devices and their place in these; `fail` gets what is wrong."""
    images = [example["image"] for example in group]
    try:
        with memory.explained(images, predictor.settings):
            labels = predictor.labels(variables, images)
    except UserError as error:
        if len(group) > 1:  # one of them may be to blame
            return [found for example in group for found in _labeled([example], predictor, variables, fail)]
        fail(f"{group[0]['name']}: {error}")
        return []
    return [(example, labels, i) for i, example in enumerate(group)]


class _Job:
    """Keeps account of images that are read, predicted and written at the same time, of which bounded numbers wait.

    Attributes:
      done: number of images whose results are written.
      failed: a line for each image that has none, with the reason.
      stopped_by: the error because of which nothing more can be written, if there was one.
    """

    def __init__(self, pool: ThreadPoolExecutor, advance: Callable[[int], None]):
        self._pool, self._advance = pool, advance
        self._writing: collections.deque[tuple[str, Future]] = collections.deque()
        self.done, self.failed, self.stopped_by = 0, list[str](), ""

    def read(self, paths: Mapping[str, epath.PathLike], check: Callable[[np.ndarray], None]) -> Iterator[Example]:
        """Yields the images that can be read and pass the check, in order."""

        def read_one(path: epath.PathLike) -> np.ndarray:
            try:
                check(image := image_files.read(path))
            except Exception as error:  # whatever a decoder raises
                reason = str(error) or type(error).__name__
                raise UserError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from error
            return image

        reading: collections.deque[tuple[str, Future]] = collections.deque()
        remaining = iter(paths.items())
        while True:
            while len(reading) < AHEAD and (item := next(remaining, None)):
                reading.append((item[0], self._pool.submit(read_one, item[1])))
            if not reading:
                return
            name, future = reading.popleft()
            try:
                yield {"name": name, "image": future.result()}
            except UserError as error:
                self.fail(str(error))

    def write(self, name: str, write: Callable[..., None], *args: Any) -> None:
        """Has the results of an image written, and waits until few are left to write."""
        self._writing.append((name, self._pool.submit(write, *args)))
        self.wait(AHEAD)

    def wait(self, left: int = 0) -> None:
        while len(self._writing) > left:
            name, future = self._writing.popleft()
            try:
                future.result()
            except (UserError, OSError) as error:
                if isinstance(error, UserError) or error.errno in OF_ONE_FILE:
                    self.fail(f"{name}: {error}")
                else:
                    self.stopped_by = str(error)
            else:
                self.done += 1
                self._advance(1)

    def fail(self, reason: str) -> None:
        self.failed.append(reason)
        self._advance(1)


def _results(output: epath.Path, name: str, server: submission.Submission | None) -> list[epath.Path]:
    """The files that an image becomes."""
    if server:
        return [output / server.folder / f"{name}.png"]
    return [output / "index" / f"{name}.png", output / "color" / f"{name}.png", output / "overlay" / f"{name}.jpg"]


def _digest(variables: Any) -> str:
    """What tells weights from others that have the same step in the same run."""
    checksum = 0
    for leaf in jax.tree.leaves(variables):
        array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{checksum:08x}"


def _signature(origin: Mapping[str, Any], image: epath.PathLike) -> str:
    """What the results of an image carry, to be known again: what they were made with, and the image's size and time."""
    made_with = {key: value for key, value in origin.items() if key != "input"}
    try:
        stat = epath.Path(image).stat()
        of = stat.length, stat.mtime
    except OSError:  # who reads it says so
        of = 0, 0
    return hashlib.sha256(json.dumps([made_with, of]).encode()).hexdigest()[:32]


def _is_done(results: Sequence[epath.Path], signature: str) -> bool:
    """Whether all results of an image are there, the first of which, written last, carries this signature."""
    try:
        for path in results[1:]:
            with path.open("rb") as file, Image.open(file):
                pass
        with results[0].open("rb") as file, Image.open(file) as image:
            image.load()
            return image.info.get(SIGNATURE) == signature
    except Exception:  # it is not there, or whatever Pillow raises over a damaged file
        return False


def _labels(labels: jax.Array, i: int, image: np.ndarray, settings: ConfigDict) -> np.ndarray:
    """Waits for the devices, and returns the i-th image's labels uint8[H, W]."""
    with memory.explained([image], settings):
        label = np.asarray(labels)[i, : image.shape[0], : image.shape[1]]
    if (label == IGNORE).any():
        raise UserError("the network's scores are not finite (NaN), so no class is the most probable")
    return label


def _write(
    results: Sequence[epath.Path],
    signature: str,
    image: np.ndarray,
    find: Callable[[], np.ndarray],
    info: DatasetInfo,
    server: submission.Submission | None,
) -> None:
    label, signed = find(), PngImagePlugin.PngInfo()
    signed.add_text(SIGNATURE, signature)
    if folders := [str(path) for path in results if path.is_dir()]:
        raise UserError(f"{', '.join(folders)}: is a folder where a result should be; move it away")
    if server:
        return save(server.encode(label), results[0], pnginfo=signed)
    index, color, mixed = results
    save(palette_image(label, info.colors), color)
    save(Image.fromarray(overlay(image, label, info.colors)), mixed, "JPEG", quality=95, subsampling=0)  # crisp edges
    save(Image.fromarray(label), index, pnginfo=signed)  # last: with it, the others are there


def _keep_others(
    results: Mapping[str, Sequence[epath.Path]],
    images: Mapping[str, epath.PathLike],
    output: epath.Path,
    origin: Mapping[str, Any],
) -> None:
    """Refuses results that would be written over an image to predict, over those of other images, or over others' files."""
    inputs, before = {os.path.realpath(path) for path in images.values()}, _read_origin(output)
    foreign = output.is_dir() and (before is None or before.get("input") != origin.get("input"))
    for path in itertools.chain.from_iterable(results.values()):
        if os.path.realpath(path) in inputs or (foreign and path.is_file()):
            raise UserError(f"{path}: is there already, and no prediction of this input wrote it; choose another --output")


def _read_origin(output: epath.Path) -> Mapping[str, Any] | None:
    """What the results in a folder were made with; None where no prediction has written there."""
    try:
        return dict(json.loads((output / ORIGIN).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_origin(output: epath.Path, origin: Mapping[str, Any], continued: bool) -> None:
    """Writes .origin.json before anything is computed.

    Raises:
      UserError: the folder cannot be written to, or a job of another origin is to be continued.
    """
    path = output / ORIGIN
    if continued and path.exists() and _read_origin(output) != json.loads(json.dumps(origin)):
        raise UserError(
            f"--output {output}: its results are of another checkpoint or other settings ({path}); leave --skip_existing "
            "out to make them anew, or choose another --output"
        )
    with files.writing(output, "nothing was predicted"), files.atomic(path) as temporary:
        temporary.write_text(json.dumps(origin, indent=2) + "\n")


def _by_size(paths: Mapping[str, epath.PathLike], predictor: Predictor) -> Mapping[str, epath.PathLike]:
    """Orders files so that whole inference compiles the network once for each size; says for how many."""
    if predictor.settings.inference != "whole":
        return paths
    sizes = dict(zip(paths, image_files.sizes(list(paths.values())), strict=True))
    predictor.announce(sizes.values())
    return {name: paths[name] for name in sorted(paths, key=sizes.__getitem__)}
