"""The input pipeline, and the only part that imports TensorFlow: out come tf.data datasets of uint8 images and labels."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Filters TensorFlow's start-up notes, which no setting of its own turns off, out of stderr; all else gets through, also
    what a crash says, as the filter is a process of its own."""
    try:
        stderr = os.dup(2) if shutil.which("grep") else None
    except OSError:  # it is closed
        stderr = None
    if stderr is None:
        yield
        return
    try:
        command = ["grep", "--line-buffered", "-vE", "^[IWE]0000 |absl::InitializeLog|^To enable the following instructions"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr) as notes:
            assert notes.stdin is not None
            os.dup2(notes.stdin.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(stderr, 2)
    finally:
        os.close(stderr)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its later notes; what goes wrong is raised
with _without_notes():
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow would reserve the memory that training needs
