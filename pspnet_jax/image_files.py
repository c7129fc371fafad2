"""Reading a user's image, by one rule for training, evaluation and prediction."""

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from pspnet_jax.errors import UserError


def read(path: epath.PathLike) -> np.ndarray:
    """Returns uint8[H, W, 3], RGB, turned upright as its EXIF orientation says.

    Raises:
      UserError: the file is no image, is damaged, or has more than 8 bits a channel.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels, expected 8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from error
