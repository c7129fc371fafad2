"""Segments videos: files, streams and cameras. Reads and writes them with PyAV, FFmpeg's libraries in Python."""

import collections
import contextlib
import fractions
import logging
import math
import os
import pathlib
import re
import signal
import threading
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
SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"
)  # fmt: skip
LIVE = re.compile(r"(rtsp|rtsps|rtmp|rtmps|srt|udp|rtp|tcp|https?)://|/dev/video\d")  # URLs, and cameras on Linux
KEPT_AUDIO = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")  # that an .mp4 can hold; other codecs are converted to AAC
RATE = 25  # frames per second, if a video does not say it
WHOLE = 0.98  # share of the frames that a whole file has, as its header may count some that are not shown
SILENCE = 10.0  # seconds without data after which a stream counts as ended
BT601, LIMITED = 6, 1  # FFmpeg's numbers of the color space and range to which RGB is converted here
QUALITY = {"crf": "18", "preset": "fast"}  # of x264: the loss is hardly visible


def is_video(source: epath.PathLike) -> bool:
    """Returns whether a name is that of a video file, a stream or a camera."""
    return os.fspath(source).lower().endswith(SUFFIXES) or is_live(source)


def is_live(source: epath.PathLike) -> bool:
    """Returns whether a name is that of a stream or a camera, such as rtsp://HOST/PATH or /dev/video0."""
    return bool(LIVE.match(os.fspath(source)))


def shown(source: epath.PathLike) -> str:
    """Returns a name for messages and files: without the user and password of a URL."""
    return re.sub(r"(?<=://)[^/?#]*@", "", os.fspath(source)) if is_live(source) else os.fspath(source)


def name_of(source: epath.PathLike) -> str:
    """Returns the name of a result: of a file or a camera, its own; of a URL, its last part or its host."""
    if not is_live(source):
        return pathlib.Path(source).stem
    try:
        url = urllib.parse.urlsplit(os.fspath(source))
        return pathlib.PurePosixPath(url.path).stem or url.hostname or "stream"
    except ValueError as error:
        raise UserError(f"{shown(source)}: is not a valid URL ({error})") from error


def frames(source: epath.PathLike) -> Iterator[np.ndarray]:
    """Yields the frames of a video, each uint8[H, W, 3], upright: `for result in segmenter(frames("clip.mp4"))`.

    Raises:
      UserError: PyAV is not installed, or the video cannot be read.
    """
    with _opened(source) as (container, stream):
        done = 0
        for packet in _packets(container, [stream], shown(source)):
            for frame in _decoded(packet, shown(source)):
                yield _pixels(frame)
                done += 1
        _warn_if_shorter(shown(source), done, stream)


def write_overlay(
    segmenter: Segmenter, source: epath.PathLike, output: epath.PathLike, alpha: float = 0.5, comment: str = ""
) -> int:
    """Writes a video with the class colors drawn over its frames, which keep their distances in time, and with its sound.

    At any time, only some frames are in memory. A stream or a camera is read until it ends, breaks off or Ctrl-C is pressed;
    what was read until then is written.

    Args:
      segmenter: segments the frames.
      source: a video file, a URL (rtsp://, http:// and others), or a camera (/dev/video0, on Linux).
      output: a local name that ends in .mp4; an existing file is replaced once the new one is complete.
      alpha: weight of the colors.
      comment: is stored in the file, see `comment_of`.

    Returns:
      The number of frames.

    Raises:
      UserError: PyAV is not installed, the video cannot be read, the output cannot be written, or a frame cannot be segmented.
    """
    target = check_output(source, output)
    with _opened(source) as (container, stream), files.writing(target, "the video is missing"), files.atomic(target) as path:
        return _Writer(segmenter, container, stream, shown(source), alpha).write(pathlib.Path(path), comment)


def check_output(source: epath.PathLike, output: epath.PathLike) -> epath.Path:
    """Returns the absolute path of the output.

    Raises:
      UserError: it is not a local .mp4 file, or is the source itself.
    """
    target = files.absolute(output)
    if target.suffix.lower() != ".mp4" or files.is_remote(target):
        raise UserError(f"{output}: videos are written as .mp4 files on a local disk; choose such a name")
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError(f"{output}: is the video itself, which would be replaced; choose another name")
    return target


def comment_of(path: epath.PathLike) -> str:
    """Returns the comment in a video file; "" if it has none."""
    with _opened(path) as (container, _):
        return container.metadata.get("comment", "")


class _Clock:
    """Times since the start of a video. They go on where those of a stream are missing or, as of a camera, start again."""

    def __init__(self, start: fractions.Fraction, time_base: fractions.Fraction, step: float):
        """Takes the start and the stream's unit of time in seconds, and the usual distance of two times in this unit."""
        self._shift, self._second, self._step = -round(start / time_base), round(1 / time_base), max(1, round(step))
        self._last = -self._step

    def __call__(self, time: int | None) -> int:
        """Returns the next time in the stream's unit, given what the stream says."""
        if time is None:
            now = self._last + self._step
        else:
            if time + self._shift < self._last - self._second:  # less is the order in which some files store frames
                self._shift = self._last + self._step - time
            now = time + self._shift
        self._last = max(self._last, now)
        return now


class _Writer:
    """Copies a video with the overlay of its frames."""

    def __init__(self, segmenter: Segmenter, container: Any, stream: Any, name: str, alpha: float):
        import av

        self._segmenter, self._alpha, self._name = segmenter, alpha, name
        self._container, self._stream = container, stream
        self._audio: Any = next(iter(container.streams.audio), None)
        if self._audio and not self._audio.codec_context:
            logger.warning(f"{name}: its sound cannot be decoded, and is left out")
            self._audio = None
        start = fractions.Fraction(container.start_time or 0, av.time_base)  # in seconds; cameras count from their start
        self._time = _Clock(start, stream.time_base, 1 / ((stream.average_rate or RATE) * stream.time_base))
        self._audio_time: Any = self._audio and _Clock(start, self._audio.time_base, 1)
        self._out_video: Any = None  # added at the first frame, whose size they have to know, as is the sound
        self._out_audio: Any = None
        self._early: list[Any] = []  # sound that is read before the first frame
        self._times = collections.deque[int]()  # of frames that are being segmented
        self._last, self._last_audio, self._interrupted = -1, -math.inf, False

    def write(self, path: pathlib.Path, comment: str) -> int:
        import av

        done, length = 0, _number_of_frames(self._container, self._stream)
        with av.open(os.fspath(path), "w", format="mp4") as self._output:
            self._output.metadata["comment"] = comment
            with progress("segmenting", length, "frames") as advance, self._interruptible():
                for result in self._segmenter(self._frames()):
                    self._write_frame(draw.overlay(result.image, result.labels, self._segmenter.info.colors, self._alpha))
                    done += 1
                    advance(1)
            if not self._out_video:
                raise UserError(f"{self._name}: the video has no frames that can be read")
            _warn_if_shorter(self._name, done, self._stream)
            self._output.mux(self._out_video.encode())
            if self._out_audio and not self._copies_audio:
                self._output.mux(self._out_audio.encode())
        return done

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Lets Ctrl-C end the reading of a stream or a camera, so that the frames read before are still written."""
        if not is_live(self._name) or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            self._interrupted = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _frames(self) -> Iterator[np.ndarray]:
        """Yields the frames, remembers their times, and copies the sound on the way."""
        for packet in _packets(self._container, [s for s in (self._stream, self._audio) if s], self._name):
            if packet.stream is self._audio:
                self._write_audio(packet)
            for frame in _decoded(packet, self._name) if packet.stream is self._stream else ():
                pixels = _pixels(frame)
                if not self._out_video:
                    self._add_streams(pixels.shape, turned=round(frame.rotation / 90) % 2 == 1)
                self._times.append(self._time(frame.pts))
                yield pixels
            if self._interrupted:
                return logger.info(f"{self._name}: stopped by Ctrl-C")

    def _add_streams(self, shape: tuple[int, ...], turned: bool) -> None:
        import av

        height, width, _ = shape
        self._out_video = video = self._output.add_stream("libx264", rate=self._stream.average_rate or RATE, options=QUALITY)
        video.width, video.height = width + width % 2, height + height % 2  # both are even in the usual pixel format
        video.pix_fmt, context = "yuv420p", video.codec_context
        context.time_base, context.colorspace, context.color_range = self._stream.time_base, BT601, LIMITED
        if ratio := self._stream.sample_aspect_ratio:
            context.sample_aspect_ratio = 1 / ratio if turned else ratio
        if self._audio:
            self._copies_audio = self._audio.codec_context.name in KEPT_AUDIO
            if self._copies_audio:
                self._out_audio = self._output.add_stream_from_template(self._audio)
            else:
                own, rates = self._audio.codec_context.sample_rate, av.Codec("aac", "w").audio_rates or [44_100]
                self._out_audio = self._output.add_stream("aac", rate=min(rates, key=lambda rate: abs(rate - own)))
                self._resampler = av.AudioResampler("fltp", self._audio.codec_context.layout, self._out_audio.rate)
        while self._early:
            self._write_audio(self._early.pop(0))

    def _write_audio(self, packet: Any) -> None:
        if not self._out_video:
            self._early.append(packet)
        elif self._copies_audio:
            if packet.dts is not None and (time := self._audio_time(packet.dts)) > self._last_audio:  # the last one is empty
                self._last_audio, later = time, (packet.pts or packet.dts) - packet.dts
                packet.pts, packet.dts, packet.stream = time + later, time, self._out_audio
                self._output.mux(packet)
        else:
            for frame in _decoded(packet, self._name):
                frame.pts, frame.time_base = self._audio_time(frame.pts), self._audio.time_base
                for resampled in self._resampler.resample(frame):
                    self._output.mux(self._out_audio.encode(resampled))

    def _write_frame(self, pixels: np.ndarray) -> None:
        import av

        video, (height, width, _) = self._out_video, pixels.shape
        padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame, time = av.VideoFrame.from_ndarray(padded, format="rgb24"), self._times.popleft()
        self._last = frame.pts = max(time, self._last + 1)
        frame.time_base = self._stream.time_base
        self._output.mux(video.encode(frame))


def _packets(container: Any, streams: list[Any], name: str) -> Iterator[Any]:
    """Yields the packets of a video. A live one ends where it breaks off; a file that does is refused."""
    import av

    try:
        yield from container.demux(streams)
    except av.FFmpegError as error:
        if not is_live(name):
            raise UserError(f"{name}: cannot be read any further ({_reason(error)})") from error
        logger.warning(f"{name}: ends here, since nothing more can be read ({_reason(error)})")


@contextlib.contextmanager
def _opened(source: epath.PathLike) -> Iterator[tuple[Any, Any]]:
    """Opens a video and its first video stream."""
    try:
        import av
    except ImportError as error:
        raise UserError(f'{source}: reading videos needs PyAV: pip install "pspnet_jax[video]"') from error
    path = os.fspath(source) if is_live(source) else os.fspath(files.user_path(source))
    name = shown(path)
    if files.is_remote(path) and not is_live(path):
        raise UserError(f"{name}: videos in buckets cannot be read; copy it to a local disk")
    try:
        timeout = (SILENCE, SILENCE) if is_live(path) else None  # without one, Ctrl-C cannot end the wait for a silent stream
        container = av.open(path, format="v4l2" if path.startswith("/dev/") else None, timeout=timeout)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"{name}: cannot be read as a video ({_reason(error)})") from error
    with container:
        if not container.streams.video:
            raise UserError(f"{name}: has no pictures, only {', '.join(s.type for s in container.streams) or 'other data'}")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _decoded(packet: Any, name: str) -> Iterator[Any]:
    """Yields the frames of a packet; a damaged one has none, as in video players."""
    import av

    try:
        yield from packet.decode()
    except av.InvalidDataError:
        logger.warning("a damaged part of the video is skipped")
    except av.FFmpegError as error:
        raise UserError(f"{name}: cannot be decoded ({_reason(error)})") from error


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


def _warn_if_shorter(name: str, frames: int, stream: Any) -> None:
    """Logs a warning about a file that ends early, if its header says how many frames it has, as that of an .mp4 does."""
    if frames < WHOLE * stream.frames and not is_live(name):
        logger.warning(f"{name}: ends after {frames} of {stream.frames} frames; if it is incomplete, copy it again")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", "") or str(error) or type(error).__name__
