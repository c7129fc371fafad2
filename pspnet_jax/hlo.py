"""Reads optimized HLO text, `jax.jit(f).lower(...).compile().as_text()`: a program's memory traffic, work and collectives.

All are counted as they are executed: a loop as often as it runs, and of a conditional, the branch with the fewest instructions.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
# These move nothing themselves: they name a value, or end what another instruction began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool  # rather than in the chip's vector memory, which layouts mark by S(1)


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: list[Array]  # of the result; several if it is a tuple
    operands: list[str]
    text: str

    @property
    def path(self) -> str:
        """The path of the operation in the JAX program, such as "jit(step)/jvp(PSPNet)/head/add", or ""."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """Returns the name of the computation that an attribute such as `body` or `calls` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert name
            current = computations.setdefault(name[2], {})
            entry = name[2] if name[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _instruction(found[1], found[2])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parses what follows `name = `: the type, then `opcode(operands), attributes`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    arrays = [_array(*found) for found in _ARRAY.findall(text[:end])]
    rest = text[end:].strip()
    start = rest.index("(")
    inside = rest[start + 1 : _closing(rest, start)]
    return Instruction(name, rest[:start], arrays, re.findall(r"%([\w.\-]+)", inside), rest)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:100]}")


def _array(kind: str, dimensions: str, layout: str) -> Array:
    bits = 8 if kind == "pred" else int(found[0]) if (found := re.search("[0-9]+", kind)) else 0
    shape = tuple(int(n) for n in dimensions.split(",") if n)
    return Array(shape, math.prod(shape) * bits // 8, "S(1)" not in layout)


def _executed(
    computations: dict[str, Computation], name: str, times: int = 1
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields the instructions that a computation executes, fusions as one, with their computation and how often they run."""
    computation = computations[name]
    for instruction in computation.values():
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            yield from _executed(computations, called("body"), times * _trips(computations, instruction))
        elif opcode == "call":
            yield from _executed(computations, called("to_apply"), times)
        elif opcode == "conditional":
            found = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            names = ("true_computation", "false_computation")
            branches = re.findall(r"%?([\w.\-]+)", found[1]) if found else [called(name) for name in names]
            yield from min((list(_executed(computations, branch, times)) for branch in branches), key=len)
        elif opcode.endswith("-start") and called("calls"):
            yield from _executed(computations, called("calls"), times)
        else:
            yield computation, instruction, times


def _fused(computations: dict[str, Computation], name: str, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields the same instructions, and those within fusions."""
    for computation, instruction, runs in _executed(computations, name, times):
        yield computation, instruction, runs
        if instruction.opcode == "fusion":
            yield from _fused(computations, instruction.called("calls"), runs)


def hbm_traffic(text: str) -> Counter[str]:
    """Estimates the bytes that a program reads from and writes to a TPU's main memory (HBM), by the path of the operation.

    XLA's own "bytes accessed" also counts the chip's vector memory and whole operands of slices. Counted here are the results
    and operands that are in HBM; of an asynchronous copy or slice, what it moves; of an operand of which a fusion reads or
    updates only slices, these. Padding to tiles is not counted.
    """
    computations, entry = parse(text)
    total = Counter[str]()
    for computation, instruction, times in _executed(computations, entry):
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            total[instruction.path] += times * _moved(computations, computation, instruction)
    return total


def flops(text: str) -> int:
    """Counts the floating-point operations of a TPU program's convolutions, as which it also computes matrix products.

    Products with padding are not counted, as in XLA's own count, which in turn counts a loop only once.
    """
    computations, entry = parse(text)
    found = _fused(computations, entry)
    return sum(times * _convolution_flops(of, i) for of, i, times in found if i.opcode == "convolution")


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    image, kernel = (computation[operand].arrays[0].shape for operand in convolution.operands)
    result, labels = convolution.arrays[0].shape, re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.text)
    assert labels, "a convolution names its dimensions"
    of_image, of_kernel, of_result = labels.groups()
    products = result[of_result.index("b")] * result[of_result.index("f")] * kernel[of_kernel.index("i")]
    window = convolution.text.partition("window={")[2].partition("}")[0]  # such as size=3x3 pad=1_1x0_0
    for axis, label in enumerate(filter(str.isdigit, of_image)):
        sizes = image[of_image.index(label)], kernel[of_kernel.index(label)], result[of_result.index(label)]
        products *= _products(*sizes, {name: values.split("x")[axis] for name, values in re.findall(r"(\w+)=(\S+)", window)})
    return 2 * products


def _products(image: int, kernel: int, result: int, window: Mapping[str, str]) -> int:
    """Counts the pairs of a kernel's element and a pixel that a convolution multiplies along one axis."""
    stride, image_dilation, kernel_dilation = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    padding = int(window.get("pad", "0_0").partition("_")[0])
    position = np.arange(result)[:, None] * stride + np.arange(kernel) * kernel_dilation - padding
    return int(((position >= 0) & (position <= (image - 1) * image_dilation) & (position % image_dilation == 0)).sum())


def _moved(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    operands = [computation[operand].arrays for operand in instruction.operands if operand in computation]
    if opcode in ("copy-start", "slice-start"):  # result: the target, the source again, and a context
        target = instruction.arrays[0 if opcode == "copy-start" else -2]
        return target.bytes * (operands[0][0].in_hbm + target.in_hbm)
    read = sum(array.bytes for arrays in operands for array in arrays if array.in_hbm)
    written = sum(array.bytes for array in instruction.arrays if array.in_hbm)
    if opcode == "fusion":
        return read + written - _untouched(computations[instruction.called("calls")], operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * sum(array.bytes for array in operands[1])
    return read + written


def _trips(computations: dict[str, Computation], loop: Instruction) -> int:
    """Returns how often a loop runs, if XLA says so or its condition compares with a constant; otherwise 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    constants = [re.search(r"constant\((\d+)\)", i.text) for i in computations[loop.called("condition")].values()]
    return max((int(found[1]) for found in constants if found), default=1)


def _untouched(fused: Computation, operands: list[list[Array]]) -> int:
    """Returns the bytes of operands and of the result that a fusion passes by, because it reads or updates only slices."""
    uses: dict[str, list[Instruction]] = {}
    for inner in fused.values():
        for operand in inner.operands:
            uses.setdefault(operand, []).append(inner)
    untouched = 0
    parameters = [instruction for instruction in fused.values() if instruction.opcode == "parameter"]
    parameters.sort(key=lambda parameter: int(parameter.text.removeprefix("parameter(").partition(")")[0]))
    for parameter, arrays in zip(parameters, operands, strict=False):
        users = list(_through_bitcasts(parameter.name, uses))
        if not users or not arrays[0].in_hbm:
            continue
        if all(user.opcode in ("dynamic-slice", "slice") for user in users):
            untouched += max(arrays[0].bytes - sum(user.arrays[0].bytes for user in users), 0)
        elif all(user.opcode == "dynamic-update-slice" for user in users):
            update = sum(fused[user.operands[1]].arrays[0].bytes for user in users)
            untouched += arrays[0].bytes  # the buffer is updated in place and not read
            untouched += max(arrays[0].bytes - update, 0)  # and written only where it is updated
    return untouched


def _through_bitcasts(name: str, uses: dict[str, list[Instruction]]) -> Iterator[Instruction]:
    for user in uses.get(name, []):
        if user.opcode == "bitcast":
            yield from _through_bitcasts(user.name, uses)
        else:
            yield user


def _results(instruction: Instruction) -> list[Array]:
    """Returns a collective's results, without the operands and contexts that an asynchronous one also returns."""
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        return instruction.arrays[len(instruction.operands) : 2 * len(instruction.operands)]
    return instruction.arrays


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns the number of collectives by kind, and the bytes of their results."""
    computations, entry = parse(text)
    count, size = Counter[str](), Counter[str]()
    for _, instruction, times in _fused(computations, entry):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            count[kind] += times
            size[kind] += times * sum(array.bytes for array in _results(instruction))
    return {kind: (count[kind], size[kind]) for kind in COLLECTIVES if count[kind]}
