"""Imports checkpoints of other projects and exports ours, without loading torch or TensorFlow on import.

source = weights.inspect("pspnet_r50-d8_769x769.pth")   # detects the model family and the network
weights.configure(config, source)                       # sets the config to match
print(weights.assumptions(config, source))              # lists what the file does not specify
model = models.build(config.model, source.num_classes)
variables = weights.load("pspnet_r50-d8_769x769.pth", model)

In place of a file, a name can be given, such as hf://timm/resnet50.tv_in1k (see `fetch`).
"""

from pspnet_jax.weights.container import split_entry
from pspnet_jax.weights.own import is_folder
from pspnet_jax.weights.remote import fetch, is_name, stem
from pspnet_jax.weights.settings import assumptions, check_normalize, configure, flags
from pspnet_jax.weights.source import Source, inspect
from pspnet_jax.weights.transfer import FORMATS, adapt_channels, check_output, load, save

__all__ = [
    "FORMATS",
    "Source",
    "adapt_channels",
    "assumptions",
    "check_normalize",
    "check_output",
    "configure",
    "fetch",
    "flags",
    "inspect",
    "is_folder",
    "is_name",
    "load",
    "save",
    "split_entry",
    "stem",
]
