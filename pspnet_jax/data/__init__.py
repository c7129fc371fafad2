"""The input pipeline, and the only part that imports TensorFlow: out come numpy batches of uint8 images and labels."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drops what C++ writes to stderr: TensorFlow's start-up notes, which no setting of its own turns off."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _silent():
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow would reserve the memory that training needs
