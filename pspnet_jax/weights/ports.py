"""Weights files of the ports of the authors' Caffe release to Keras (.h5) and TensorFlow (.npy, checkpoints).

All of them use Caffe's layer names; the batch norm of a layer is called NAME_bn. Arrays are returned by "LAYER/ARRAY", where
ARRAY is Keras' name: kernel (in OIHW order), bias, gamma, beta, moving_mean or moving_variance. No code in a file is run.

The weights were trained by Caffe, so they are imported as Caffe's, with its protocol. The ports' own code, Vladkryvoruchko's
PSPNet-Keras-tensorflow and hellochick's PSPNet-tensorflow, agrees with Caffe's in the epsilon of batch norm (1e-5), the mean
and channel order of the images, the pooling kernels and the interpolation. It differs in this:
- At depth 101, it has the stride of conv3_1 in the 1x1 convolution. To compute what it computes, set model.stride_in=conv1x1.
- It pads the strided layers as TensorFlow does. That is the same for odd sizes, such as 473 and 713. For even sizes, such as
  the 720 pixels of hellochick's Cityscapes model, the features are shifted by a pixel.
- The Keras port pads windows with black instead of the mean. hellochick's predicts whole images, where pooling kernels that are
  made for a crop give other cells.
"""

import itertools
import pickle
import pickletools
import re
from typing import Any

import numpy as np
from etils import epath

from pspnet_jax.errors import UserError, first_line
from pspnet_jax.weights.names import to_oihw
from pspnet_jax.weights.pytorch import Arrays

KERAS_NAMES = {  # of the arrays of caffe-tensorflow's layers
    "weights": "kernel",
    "biases": "bias",
    "scale": "gamma",
    "offset": "beta",
    "mean": "moving_mean",
    "variance": "moving_variance",
}
AGAIN = "copy or download it again"
MAX_TUPLES = 20_000  # in a pickle, ten times those of depth 101; hashing many more, nested, would overflow the stack


def read_h5(path: epath.Path) -> Arrays:
    """Reads what Keras 2 writes by `save_weights` or `save`.

    Raises:
      UserError: the file is damaged, or its arrays are in other files.
    """
    import h5py

    found: Arrays = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and "/" in name and item.shape is not None and item.dtype.kind in "fiu":
            if item.external or item.is_virtual:
                raise UserError(f"{path}: keeps {name} in another file, so nothing was read; save all weights in one file")
            layer, *_, array = name.split("/")
            key = f"{layer}/{array.split(':')[0]}"
            found[name if key in found else key] = to_oihw(item[()])

    try:
        with h5py.File(path, "r") as file:
            own = isinstance(file.get("model_weights", getlink=True), h5py.HardLink)  # other links may lead to other files
            (file["model_weights"] if own else file).visititems(add)  # which follows hard links alone
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make HDF5 raise anything
        raise UserError(f"{path}: cannot be read as HDF5; {AGAIN} ({first_line(error)})") from error
    return found


def read_npy(path: epath.Path) -> Arrays:
    """Reads what caffe-tensorflow writes: a NumPy file with a pickle of {layer: {"weights": array, ...}}.

    Raises:
      UserError: the file is damaged, or has anything but dicts, lists, text, numbers and arrays.
    """
    expected = "expected the dict of layers that caffe-tensorflow writes"
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
            if not dtype.hasobject:
                raise UserError(f"{path}: has an array {dtype}{list(shape)}; {expected}")
            begin = file.tell()
            tuples = (operation for operation, *_ in pickletools.genops(file) if operation.name.startswith("TUPLE"))
            if next(itertools.islice(tuples, MAX_TUPLES, None), None):
                raise UserError(f"{path}: has more than {MAX_TUPLES} tuples; {expected}")
            file.seek(begin)
            content = _Unpickler(file, encoding="latin1").load()  # Python 2's text, and bytes of its arrays
            layers = content.value[0] if isinstance(content, _Array) else content
            if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
                raise UserError(f"{path}: has {type(layers).__name__} {list(layers)[:3]}; {expected}")
            flat = {(str(k), str(n)): v.value for k, layer in layers.items() for n, v in layer.items()}
            arrays = {f"{layer}/{KERAS_NAMES.get(name, name)}": np.asarray(array) for (layer, name), array in flat.items()}
        except (UserError, MemoryError):
            raise
        except _ForbiddenError as error:
            raise UserError(f"{path}: has {error}, which could run code, so nothing was read; {expected}") from error
        except Exception as error:  # a damaged or hostile file can raise anything
            raise UserError(f"{path}: cannot be read; {expected}, or {AGAIN} ({first_line(error)})") from error
    return {key: to_oihw(array if key.endswith("/kernel") else array.ravel()) for key, array in arrays.items()}


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _Array:
    """Stands for numpy.ndarray in a pickle: NumPy's own class trusts the pickle, which could make it read any memory."""

    value: Any = None  # an array of numbers, or the list of the objects in an array of objects

    def __init__(self, *ignored: object):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        if dtype.code.startswith("O"):
            if not isinstance(content, list):
                raise _ForbiddenError("an array of pointers")
            self.value = content
        else:
            content = content.encode("latin1") if isinstance(content, str) else content
            numbers = np.frombuffer(content, dtype.order + dtype.code)
            self.value = numbers.reshape(shape, order="F" if is_fortran else "C")


class _Dtype:
    """Stands for numpy.dtype in a pickle; only numbers and objects are allowed."""

    order = "="

    def __init__(self, code: str, *ignored: object):
        if not re.fullmatch(r"[fiu][1248]|O8?", code):
            raise _ForbiddenError(f"arrays of dtype {code!r}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


class _Unpickler(pickle.Unpickler):
    """Constructs nothing but dicts, lists, text, numbers and the classes above."""

    ALLOWED: dict[str, Any] = {  # noqa: RUF012
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy._core.multiarray._reconstruct": _Array,
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "_codecs.encode": str.encode,  # with which Python 3 writes bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in self.ALLOWED:
            raise _ForbiddenError(full)
        return self.ALLOWED[full]


def read_checkpoint(path: epath.Path) -> Arrays:
    """Reads a TensorFlow checkpoint, with TensorFlow's own reader, which runs nothing and verifies checksums.

    Args:
      path: NAME.index, beside which is NAME.data-00000-of-00001; or a checkpoint of the old format, which is one file.

    Raises:
      UserError: TensorFlow is missing, or the checkpoint is damaged or incomplete.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"{path}: this format needs TensorFlow: pip install 'pspnet_jax[train]'") from error
    try:
        reader = tf.train.load_checkpoint(str(path).removesuffix(".index"))
        arrays = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except MemoryError:
        raise
    except Exception as error:  # TensorFlow's, of many kinds
        raise UserError(f"{path}: cannot be read as a checkpoint; {AGAIN} ({first_line(error)})") from error
    found: Arrays = {}
    for name, array in arrays.items():
        layer, _, last = name.rpartition("/")
        found[f"{layer}/{KERAS_NAMES.get(last, last)}" if layer else name] = to_oihw(np.asarray(array))
    return found
