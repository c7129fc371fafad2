"""Segments videos: files, streams and cameras. Reads and writes them with PyAV, FFmpeg's libraries in Python."""

import collections
import contextlib
import fractions
import logging
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import UserError
from pspnet_jax.infer import draw
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
LIVE = re.compile(r"(rtsp|rtsps|rtmp|rtmps|srt|udp|rtp|tcp|https?)://|/dev/video\d")  # URLs, and cameras on Linux
KEPT_AUDIO = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")  # that an .mp4 can hold; other codecs are converted to AAC
QUALITY = {"crf": "18", "preset": "fast"}  # of x264: the loss is hardly visible


def is_video(source: epath.PathLike) -> bool:
    """Returns whether a name is that of a video file, a stream or a camera."""
    return os.fspath(source).lower().endswith(SUFFIXES) or is_live(source)


def is_live(source: epath.PathLike) -> bool:
    """Returns whether a name is that of a stream or a camera, such as rtsp://HOST/PATH or /dev/video0."""
    return bool(LIVE.match(os.fspath(source)))


def name_of(source: epath.PathLike) -> str:
    """Returns the name of a result: of a file or a camera, its own; of a URL, its last part or its host."""
    path = pathlib.PurePosixPath(urllib.parse.urlsplit(os.fspath(source)).path)
    return path.stem or urllib.parse.urlsplit(os.fspath(source)).hostname or "video"


def frames(source: epath.PathLike) -> Iterator[np.ndarray]:
    """Yields the frames of a video, each uint8[H, W, 3], upright: `for result in segmenter(frames("clip.mp4"))`.

    Raises:
      UserError: PyAV is not installed, or the video cannot be read.
    """
    with _opened(source) as (container, stream):
        for packet in container.demux(stream):
            for frame in _decoded(packet):
                yield _pixels(frame)


def write_overlay(segmenter: Segmenter, source: epath.PathLike, output: epath.PathLike, alpha: float = 0.5) -> int:
    """Writes a video with the class colors drawn over its frames, which keep their times, and with its sound.

    At any time, only some frames are in memory. A stream or a camera is read until it ends or Ctrl-C is pressed.

    Args:
      segmenter: segments the frames.
      source: a video file, a URL (rtsp://, http:// and others), or a camera (/dev/video0).
      output: a local name that ends in .mp4; an existing file is replaced once the new one is complete.
      alpha: weight of the colors.

    Returns:
      The number of frames.

    Raises:
      UserError: PyAV is not installed, the video cannot be read, the output cannot be written, or a frame cannot be segmented.
    """
    target = files.absolute(output)
    if target.suffix.lower() != ".mp4" or files.is_remote(target):
        raise UserError(f"{output}: videos are written as .mp4 files on a local disk; choose such a name")
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError(f"{output}: is the video itself, which would be replaced; choose another name")
    with _opened(source) as (container, stream), files.writing(target, "the video is missing"), files.atomic(target) as path:
        return _Writer(segmenter, container, stream, os.fspath(source), alpha).write(pathlib.Path(path))


class _Writer:
    """Copies a video with the overlay of its frames."""

    def __init__(self, segmenter: Segmenter, container: Any, stream: Any, name: str, alpha: float):
        self._segmenter, self._alpha, self._live, self._name = segmenter, alpha, is_live(name), name
        self._container, self._stream = container, stream
        self._audio = next(iter(container.streams.audio), None)
        self._out_video: Any = None  # added at the first frame, whose size they have to know, as is the sound
        self._out_audio: Any = None
        self._early: list[Any] = []  # sound that is read before the first frame
        self._times = collections.deque[tuple[int | None, fractions.Fraction | None]]()  # of frames that are being segmented

    def write(self, path: pathlib.Path) -> int:
        import av

        done, length = 0, _number_of_frames(self._container, self._stream)
        with av.open(os.fspath(path), "w", format="mp4") as self._output:
            with progress("segmenting", length, "frames") as advance, self._until_interrupted():
                for result in self._segmenter(self._frames()):
                    self._write_frame(draw.overlay(result.image, result.labels, self._segmenter.info.colors, self._alpha))
                    done += 1
                    advance(1)
            if not self._out_video:
                raise UserError(f"{self._name}: the video has no frames that can be read")
            self._output.mux(self._out_video.encode())
            if self._out_audio and not self._copies_audio:
                self._output.mux(self._out_audio.encode())
        return done

    @contextlib.contextmanager
    def _until_interrupted(self) -> Iterator[None]:
        """Lets Ctrl-C end the reading of a stream or a camera; what was read until then is written."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._live:
                raise
            logger.info(f"{self._name}: stopped by Ctrl-C")

    def _frames(self) -> Iterator[np.ndarray]:
        """Yields the frames, remembers their times, and copies the sound on the way."""
        for packet in self._container.demux([stream for stream in (self._stream, self._audio) if stream]):
            if packet.stream is self._audio:
                self._write_audio(packet)
                continue
            for frame in _decoded(packet):
                pixels = _pixels(frame)
                if not self._out_video:
                    self._add_streams(*pixels.shape[:2])
                self._times.append((frame.pts, frame.time_base))
                yield pixels

    def _add_streams(self, height: int, width: int) -> None:
        import av

        self._out_video = video = self._output.add_stream("libx264", rate=self._stream.average_rate or 25, options=QUALITY)
        video.width, video.height = width + width % 2, height + height % 2  # both are even in the usual pixel format
        video.pix_fmt, video.codec_context.time_base = "yuv420p", self._stream.time_base
        if self._audio:
            self._copies_audio = self._audio.codec_context.name in KEPT_AUDIO
            if self._copies_audio:
                self._out_audio = self._output.add_stream_from_template(self._audio)
            else:
                self._out_audio = self._output.add_stream("aac", rate=self._audio.codec_context.sample_rate)
                self._resampler = av.AudioResampler("fltp", self._audio.codec_context.layout, self._out_audio.rate)
        while self._early:
            self._write_audio(self._early.pop(0))

    def _write_audio(self, packet: Any) -> None:
        if not self._out_video:
            self._early.append(packet)
        elif self._copies_audio:
            if packet.dts is not None:  # the last packet only says that there are no more
                packet.stream = self._out_audio
                self._output.mux(packet)
        else:
            for frame in _decoded(packet):
                for resampled in self._resampler.resample(frame):
                    self._output.mux(self._out_audio.encode(resampled))

    def _write_frame(self, pixels: np.ndarray) -> None:
        import av

        video, (height, width, _) = self._out_video, pixels.shape
        padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
        frame.pts, frame.time_base = self._times.popleft()
        if frame.pts is None:  # some streams have no times
            frame.time_base = None
        self._output.mux(video.encode(frame))


@contextlib.contextmanager
def _opened(source: epath.PathLike) -> Iterator[tuple[Any, Any]]:
    """Opens a video and its first video stream.

    Raises:
      UserError: PyAV is not installed, or the source is not a video that can be read.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f'{source}: reading videos needs PyAV: pip install "pspnet_jax[video]"') from error
    name = os.fspath(source)
    name = name if is_live(name) else os.fspath(files.user_path(name))
    try:
        container = av.open(name, format="v4l2" if name.startswith("/dev/") else None)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"{name}: cannot be read as a video ({_reason(error)})") from error
    with container:
        if not container.streams.video:
            raise UserError(f"{name}: has no pictures, only {', '.join(s.type for s in container.streams) or 'other data'}")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise UserError(f"{name}: cannot be read any further ({_reason(error)})") from error


def _decoded(packet: Any) -> Iterator[Any]:
    """Yields the frames of a packet; a damaged one has none, as in video players."""
    import av

    try:
        yield from packet.decode()
    except av.InvalidDataError:
        logger.warning("a damaged part of the video is skipped")


def _pixels(frame: Any) -> np.ndarray:
    """Returns a frame as uint8[H, W, 3], turned as its metadata says."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4)) if frame.rotation else pixels


def _number_of_frames(container: Any, stream: Any) -> float | None:
    """Returns the number of frames of a file, or what it should be by its duration; None if that is unknown."""
    import av

    if stream.frames or not (container.duration and stream.average_rate):
        return stream.frames or None
    return round(container.duration / av.time_base * stream.average_rate)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", "") or str(error) or type(error).__name__
