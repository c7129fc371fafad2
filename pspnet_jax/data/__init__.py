"""The input pipeline: tf.data datasets of uint8 images and labels. Only this package and jobs.py need TensorFlow."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def _without_startup_messages() -> Iterator[None]:
    """Removes TensorFlow's startup messages, which no setting turns off, from stderr. The filter is a separate process, so that
    the output of a crash still gets through."""
    try:
        stderr = os.dup(2) if shutil.which("grep") else None
    except OSError:  # stderr is closed
        stderr = None
    if stderr is None:
        yield
        return
    try:
        command = ["grep", "--line-buffered", "-vE", "^[IWE]0000 |absl::InitializeLog|^To enable the following instructions"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr) as grep:
            assert grep.stdin is not None
            os.dup2(grep.stdin.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(stderr, 2)
    finally:
        os.close(stderr)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides later messages; errors are raised anyway
with _without_startup_messages():
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow would reserve the memory that training needs
