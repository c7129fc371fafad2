"""Videos keep their frames, their times and their sound; streams can be interrupted."""

import fractions
import functools
import http.server
import math
import signal
import threading
import types

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.infer import video
from pspnet_jax.infer.segmenter import AHEAD
from tests.infer.test_segmenter import segmenter

av = pytest.importorskip("av", reason='PyAV is not installed: pip install "pspnet_jax[video]"')
TIMES = (0, 1, 2, 4, 7, 8, 9, 10, 11, 15)  # of the frames, in tenths of a second
RATE = 44100
AUDIO = {"aac": "fltp", "pcm_s16le": "s16"}


def write(path, size=(48, 64), audio="", codec="mpeg4", format="yuv420p", rate=RATE):
    """Writes a video of one color per frame, which gets brighter, with a tone as long as the video."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream(codec, rate=10)
        pictures.height, pictures.width, pictures.pix_fmt = *size, format
        sound = container.add_stream(audio, rate=rate) if audio else None
        for time in TIMES:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 40 + 10 * time, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, fractions.Fraction(1, 10)
            container.mux(pictures.encode(frame))
        if sound:
            wave = np.sin(2 * math.pi * 440 * np.arange(rate * 16 // 10) / rate)[None]
            scaled = wave.astype(np.float32) if AUDIO[audio] == "fltp" else (wave * 20000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(scaled, format=AUDIO[audio], layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, fractions.Fraction(1, rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
        container.mux(pictures.encode())
    return path


class Fake:
    """A segmenter that finds only class 0, which is black. It reads three images ahead, and after some, Ctrl-C is pressed."""

    info = types.SimpleNamespace(colors=((0, 0, 0),))

    def __init__(self, stop_after=math.inf):
        self.stop_after, self.read = stop_after, 0

    def __call__(self, images):
        waiting = []
        for image in images:
            self.read += 1
            waiting.append(types.SimpleNamespace(image=image, labels=np.zeros(image.shape[:2], np.uint8)))
            if self.read == self.stop_after:
                signal.raise_signal(signal.SIGINT)
            if len(waiting) > 3:
                yield waiting.pop(0)
        yield from waiting


def decoded(path):
    """Returns the times of the frames in seconds, their mean colors, and their shapes."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [float(f.pts * f.time_base) for f in frames], [f.to_ndarray(format="gray").mean() for f in frames], frames[0]


def sound(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def test_frames_keep_their_times_and_are_drawn_over(tmp_path):
    assert video.write_overlay(Fake(), write(tmp_path / "clip.mp4"), tmp_path / "out.mp4", alpha=0.25) == len(TIMES)
    times, colors, _ = decoded(tmp_path / "out.mp4")
    assert times == pytest.approx([time / 10 for time in TIMES])
    np.testing.assert_allclose(colors, [0.75 * (40 + 10 * time) for time in TIMES], atol=4)


def test_a_file_that_ends_early_is_named(tmp_path, caplog):
    """As an .mp4 that was not copied to its end, whose header at the beginning has the number of all frames."""
    for name in ("clip.mp4", "clip.mkv", "clip.ts"):
        assert len(list(video.frames(write(tmp_path / name)))) == len(TIMES)
    assert "ends after" not in caplog.text
    noise = np.random.default_rng(0)
    with av.open(str(tmp_path / "long.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 64
        for _ in range(30):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(noise.integers(0, 256, (64, 64, 3), np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())
    content = (tmp_path / "long.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 7 // 10])
    found = len(list(video.frames(tmp_path / "cut.mp4")))
    assert found < 30
    assert f"cut.mp4: ends after {found} of 30 frames; if it is incomplete, copy it again" in caplog.text
    caplog.clear()
    assert video.write_overlay(Fake(), tmp_path / "cut.mp4", tmp_path / "out.mp4") == found
    assert f"cut.mp4: ends after {found} of 30 frames" in caplog.text


def test_sound_is_copied(tmp_path):
    video.write_overlay(Fake(), write(tmp_path / "clip.mp4", audio="aac"), tmp_path / "out.mp4")
    assert sound(tmp_path / "out.mp4") == sound(tmp_path / "clip.mp4")


def test_sound_that_mp4_cannot_hold_is_converted(tmp_path):
    video.write_overlay(Fake(), write(tmp_path / "clip.avi", audio="pcm_s16le"), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert len(wave) / RATE == pytest.approx(1.6, abs=0.05)
    spectrum = np.abs(np.fft.rfft(wave[2048:-2048]))
    assert spectrum.argmax() * RATE / (len(wave) - 4096) == pytest.approx(440, abs=2)


def test_sizes_become_even(tmp_path):
    """The usual pixel format has a color for each square of four pixels."""
    write(tmp_path / "clip.mkv", (33, 47), codec="ffv1", format="bgr0")
    video.write_overlay(Fake(), tmp_path / "clip.mkv", tmp_path / "out.mp4")
    assert next(video.frames(tmp_path / "clip.mkv")).shape == (33, 47, 3)
    assert next(video.frames(tmp_path / "out.mp4")).shape == (34, 48, 3)


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (2, 0)), (-90, (0, 1)), (180, (2, 1)), (-180, (2, 1))])
def test_frames_are_turned_as_phones_say(degrees, corner):
    """A white pixel in the first corner moves counterclockwise."""
    pixels = np.zeros((3, 2, 3) if degrees % 180 == 0 else (2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    frame = types.SimpleNamespace(rotation=degrees, to_ndarray=lambda format: pixels)
    turned = video._pixels(frame)
    assert turned.shape == (3, 2, 3)
    assert turned[corner].tolist() == [255] * 3


@pytest.mark.slow
def test_a_video_is_segmented_like_its_frames(tmp_path, monkeypatch):
    """A few frames are in memory at a time."""
    network, read = segmenter(), []
    write(tmp_path / "clip.mp4", (40, 40))
    alone = [network(frame).labels for frame in list(video.frames(tmp_path / "clip.mp4"))]
    assert all(np.array_equal(a.labels, b) for a, b in zip(network(video.frames(tmp_path / "clip.mp4")), alone, strict=True))
    pixels, written = video._pixels, []
    monkeypatch.setattr(video, "_pixels", lambda frame: read.append(0) or pixels(frame))
    monkeypatch.setattr(video, "_decoded", lambda packet, name: [f for f in packet.decode() for _ in range(20)])  # 200 frames
    write_frame = video._Writer._write_frame
    ahead = []

    def count(self, drawn):
        ahead.append(len(read) - len(written))
        written.append(0)
        self._times[0] = len(written)
        write_frame(self, drawn)

    monkeypatch.setattr(video._Writer, "_write_frame", count)
    assert video.write_overlay(network, tmp_path / "clip.mp4", tmp_path / "out.mp4") == 200
    print(f"\nat most {max(ahead)} frames in memory")
    assert max(ahead) < 2 * AHEAD


@pytest.fixture
def served(tmp_path):
    """The address of a server that has clip.mp4."""
    write(tmp_path / "clip.mp4", audio="aac")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/clip.mp4"
    server.shutdown()
    server.server_close()


def test_a_url_is_read_like_a_file(served, tmp_path):
    remote, local = video.frames(served), video.frames(tmp_path / "clip.mp4")
    assert all(np.array_equal(a, b) for a, b in zip(remote, local, strict=True))
    assert video.name_of(served) == "clip"
    assert video.name_of("rtsp://camera.local") == "camera.local"


def test_an_interrupted_stream_is_kept_and_an_interrupted_file_is_not(served, tmp_path):
    """All frames that were read are written. The handler is set, since tests in the background of a shell ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        network = Fake(stop_after=5)
        assert 5 <= video.write_overlay(network, served, tmp_path / "stream.mp4") == network.read < len(TIMES)
        with pytest.raises(KeyboardInterrupt):
            video.write_overlay(Fake(stop_after=5), tmp_path / "clip.mp4", tmp_path / "file.mp4")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert decoded(tmp_path / "stream.mp4")[0][:5] == pytest.approx([0, 0.1, 0.2, 0.4, 0.7])
    assert not (tmp_path / "file.mp4").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "stream.mp4"]


@pytest.mark.parametrize("live", [True, False])
def test_where_a_video_breaks_off(live, tmp_path, monkeypatch):
    """What a stream has sent until then is kept; a file that ends in the middle is named."""
    monkeypatch.setattr(video, "is_live", lambda name: live)

    class Broken:
        def demux(self, streams):
            yield "packet"
            raise av.error.ConnectionResetError(104, "Connection reset by peer")

    packets = video._packets(Broken(), [], "clip")
    assert next(packets) == "packet"
    if live:
        assert list(packets) == []
    else:
        with pytest.raises(UserError, match=r"^clip: cannot be read any further \(Connection reset by peer\)$"):
            next(packets)


def test_times_begin_at_zero_and_go_on_where_they_start_again(tmp_path):
    """Those of a camera count from the start of its machine, and begin anew when it is started again."""
    with av.open(str(tmp_path / "clip.ts"), "w", format="mpegts") as container:
        pictures = container.add_stream("mpeg2video", rate=10)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        for time in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 100, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 36_000 + time, fractions.Fraction(1, 10)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
    assert video.write_overlay(Fake(), tmp_path / "clip.ts", tmp_path / "out.mp4") == 20
    assert decoded(tmp_path / "out.mp4")[0] == pytest.approx([time / 10 for time in range(20)], abs=0.001)
    header = (tmp_path / "out.mp4").read_bytes()
    header = header[header.index(b"mvhd") :]  # version and flags, two dates, the time scale and the duration
    scale, duration = (int.from_bytes(header[start : start + 4], "big") for start in (16, 20))
    assert duration / scale == pytest.approx(2, abs=0.2)
    (tmp_path / "twice.ts").write_bytes(2 * (tmp_path / "clip.ts").read_bytes())
    assert video.write_overlay(Fake(), tmp_path / "twice.ts", tmp_path / "out.mp4") == 40
    assert decoded(tmp_path / "out.mp4")[0] == pytest.approx([time / 10 for time in range(40)], abs=0.001)


def test_frames_without_times_follow_at_the_usual_rate(tmp_path):
    with av.open(str(tmp_path / "clip.ts"), "w", format="h264") as container:
        pictures = container.add_stream("libx264", rate=25, options={"bf": "0"})
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        for _ in range(8):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 100, np.uint8), format="rgb24")))
        container.mux(pictures.encode())
    assert video.write_overlay(Fake(), tmp_path / "clip.ts", tmp_path / "out.mp4") == 8
    assert decoded(tmp_path / "out.mp4")[0] == pytest.approx([time / 25 for time in range(8)], abs=0.001)


def test_sound_of_an_unusual_rate_is_converted_to_the_nearest(tmp_path):
    video.write_overlay(Fake(), write(tmp_path / "clip.avi", audio="pcm_s16le", rate=11_024), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = list(container.decode(audio=0))
    assert frames[0].sample_rate == 11_025
    assert sum(frame.samples for frame in frames) / 11_025 == pytest.approx(1.6, abs=0.2)


def test_passwords_are_not_shown():
    assert video.shown("rtsp://me:secret@camera:554/live?a=b@c") == "rtsp://camera:554/live?a=b@c"
    assert video.shown("a@b/clip.mp4") == "a@b/clip.mp4"


def test_colors_and_shape_of_pixels_are_tagged(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        pictures = container.add_stream("libx264", rate=10)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        pictures.codec_context.sample_aspect_ratio = fractions.Fraction(4, 3)
        container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 100, np.uint8), format="rgb24")))
        container.mux(pictures.encode())
    video.write_overlay(Fake(), tmp_path / "clip.mp4", tmp_path / "out.mp4", comment="step 3")
    with av.open(str(tmp_path / "out.mp4")) as container:
        [stream] = container.streams.video
        assert stream.sample_aspect_ratio == fractions.Fraction(4, 3)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (video.BT601, video.LIMITED)
    assert video.comment_of(tmp_path / "out.mp4") == "step 3"


def test_names_of_results(tmp_path):
    assert [video.name_of(name) for name in ("a/take #1.mp4", "what? now.mp4", "/dev/video0")] == [
        "take #1",
        "what? now",
        "video0",
    ]
    with pytest.raises(UserError, match="is not a valid URL"):
        video.name_of("http://[cam]/x")


def test_mistakes(tmp_path):
    clip = write(tmp_path / "clip.mp4", audio="aac")
    (tmp_path / "text.mp4").write_text("no video")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=RATE)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for source, output, words in (
        ("missing.mp4", "out.mp4", r"missing.mp4: cannot be read as a video \(No such file or directory\)"),
        ("text.mp4", "out.mp4", r"text.mp4: cannot be read as a video \(Invalid data"),
        ("sound.mp4", "out.mp4", r"sound.mp4: has no pictures, only audio"),
        (clip.name, "out.avi", r"out.avi: videos are written as .mp4 files on a local disk"),
        (clip.name, clip.name, r"clip.mp4: is the video itself"),
    ):
        with pytest.raises((UserError, MissingFileError), match=words):
            video.write_overlay(Fake(), tmp_path / source, tmp_path / output)
    assert not (tmp_path / "out.mp4").exists()


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r'reading videos needs PyAV: pip install "pspnet_jax\[video\]"'):
        next(video.frames("clip.mp4"))
