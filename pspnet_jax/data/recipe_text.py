"""The recipe for a folder that survey_folder.py has looked at: every guess is a line with a comment."""

import collections
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from pspnet_jax import class_lists, image_files
from pspnet_jax.data import label_values
from pspnet_jax.data.survey_folder import Folder, Found
from pspnet_jax.errors import UserError

SAMPLES = 20  # images whose pixels are read
BATCH, EPOCHS = 8, 50
LARGEST_CROP, SMALLEST_CROP = 321, 49  # pixels
LARGE = 1024  # long side in pixels from which photos are reduced
MAPS = (".tif", ".tiff", ".jp2")  # formats of images that are not photos, and whose details are small

TEMPLATE = '''"""{name}: written by --mode check for {root}.

python -m pspnet_jax.main --config {file}

What was found, and how it was understood, is in the comments; lines with GUESS are those to check first.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config

LABELS = {{  # {kind} in the label files: class, or None for pixels that are ignored
{labels}
}}


def get_config() -> ConfigDict:
    config = base_config()
{fields}
    return config
'''
