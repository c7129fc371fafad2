"""The implementations that `benchmarks.model` compares, ours and semseg's, behind one interface."""

import dataclasses
import importlib
import math
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import datasets, losses, models, optimizers, parallel, programs
from pspnet_jax.models import cpu
from pspnet_jax.train.step import TrainState, make_init_state, make_train_step

JOBS, DTYPES = ("inference", "train"), ("float32", "bfloat16")
HEADS = {"plain": False, "factored": True}  # model.factored_head


@dataclasses.dataclass(frozen=True)
class Task:
    """What to measure: a recipe with its batch size and dtype set, one of JOBS, a batch, and the devices."""

    config: ConfigDict
    num_classes: int
    job: str
    batch: dict[str, np.ndarray]
    mesh: Mesh


@dataclasses.dataclass
class Candidate:
    """One implementation of a task, ready to run.

    Attributes:
      launch: starts a step and returns its result, which may still be pending.
      wait: waits for a result.
      compile_seconds: time to trace, lower and compile; None if nothing is compiled ahead of time.
      program_bytes: memory that the compiled program allocates beyond its arguments; None if unknown.
      program: the optimized HLO text of the compiled program.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], Any]
    compile_seconds: float | None = None
    program_bytes: int | None = None
    program: str = ""

    def time(self, steps: int) -> tuple[float, float]:
        """Runs steps without waiting in between; returns the mean wall time and mean CPU time of one step."""
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            result = self.launch()
        self.wait(result)
        return (time.perf_counter() - start) / steps, (time.process_time() - cpu_start) / steps


def random_batch(size: int, crop: Sequence[int], num_classes: int) -> dict[str, np.ndarray]:
    """Returns noise around a brightness per image, uint8[N, H, W, 3], and labels uint8[N, H, W], a tenth of them ignored."""
    random = np.random.default_rng(0)
    brightness = random.uniform(50, 200, (size, 1, 1, 3))
    images = np.clip(random.normal(brightness, 30, (size, *crop, 3)), 0, 255).astype(np.uint8)
    labels = random.integers(0, num_classes, (size, *crop), dtype=np.uint8)
    return {"image": images, "label": np.where(random.random(labels.shape) < 0.1, np.uint8(datasets.IGNORE), labels)}


def make_task(config: ConfigDict, num_classes: int, job: str, batch_size: int, dtype: str, mesh: Mesh) -> Task:
    """Returns a task with the batch size and dtype set in a copy of the config, and a random batch."""
    config = ConfigDict(config.to_dict())
    config.batch_size, config.model.dtype = batch_size, dtype
    return Task(config, num_classes, job, random_batch(batch_size, config.augment.crop, num_classes), mesh)


def job_functions(config: ConfigDict, num_classes: int, job: str, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the jitted function of a job, and one that makes its initial train state.

    For "train", the function is (state, batch) -> (state, metrics); for "inference", (state, normalized images) -> logits.
    """
    model = models.build(config.model, num_classes)
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    init = make_init_state(config, model, optimizer, mesh, (*config.augment.crop, 3))
    if job == "train":
        return make_train_step(config, model, losses.build(config), optimizer, mesh), init

    def infer(state: TrainState, images: jax.Array) -> jax.Array:
        return model.apply(state.variables, images, train=False)

    everywhere, shared = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    options = programs.options(config.model.dtype, mesh)
    return jax.jit(infer, in_shardings=(everywhere, shared), out_shardings=shared, compiler_options=options), init


def functions_and_data(task: Task, head: str) -> tuple[Any, Any, Any]:
    """Returns the jitted function of a task with one of HEADS, the function that makes its state, and its input."""
    config = ConfigDict(task.config.to_dict())
    config.model.factored_head = HEADS[head]
    data = task.batch if task.job == "train" else np.asarray(models.normalize(task.batch["image"], config.normalize))
    return *job_functions(config, task.num_classes, task.job, task.mesh), data


def count_flops(task: Task) -> float:
    """Returns the FLOPs of one step of the plain network on all devices, as XLA counts them before optimization.

    All convolutions are counted as direct ones. Of the losses' loops over rows, XLA counts one pass.
    """
    function, init, data = functions_and_data(task, "plain")
    with unittest.mock.patch.object(cpu, "WINOGRAD", math.inf):
        return function.lower(jax.eval_shape(init), data).cost_analysis()["flops"]


def ours(task: Task, head: str) -> Candidate:
    """Returns our compiled network or train step, with weights and batch on the devices."""
    function, init, data = functions_and_data(task, head)
    data, state = jax.device_put(data, parallel.batch_sharding(task.mesh)), init()
    start = time.perf_counter()
    compiled = function.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    needed = memory and memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    def train() -> Any:
        nonlocal state
        state, scalars = compiled(state, data)
        return state, scalars

    launch = train if task.job == "train" else lambda: compiled(state, data)
    return Candidate(launch, jax.block_until_ready, compile_seconds, needed, compiled.as_text() or "")


def semseg(task: Task, path: str, channels_last: bool = False, compiled: bool = False) -> Candidate:
    """Returns the authors' network, loss and optimizer, with autocast for bfloat16 and without their metrics."""
    import torch

    if path not in sys.path:
        sys.path.insert(0, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, training = task.config.model, task.job == "train"
    network = importlib.import_module("model.pspnet").PSPNet(
        model.depth, model.bins, model.dropout, task.num_classes, use_ppm=bool(model.bins), pretrained=False
    )
    network = network.to(device, memory_format=layout).train(training)
    images = torch.from_numpy(np.array(models.normalize(task.batch["image"], task.config.normalize))).permute(0, 3, 1, 2)
    images = images.to(device).contiguous(memory_format=layout)
    labels = torch.from_numpy(task.batch["label"]).to(device).long()
    optimizer = semseg_optimizer(network, task.config.optimizer)
    forward = torch.compile(network) if compiled else network
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == "bfloat16")

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            _, loss, auxiliary_loss = forward(images, labels)
            loss = loss + task.config.loss.auxiliary_weight * auxiliary_loss
        loss.backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad(), autocast:
            forward(images)

    def wait(_: None) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Candidate(train if training else infer, wait)


def semseg_optimizer(network: Any, optimizer: ConfigDict) -> Any:
    """Returns the SGD of tool/train.py: pyramid and heads, whose names do not start with "layer", learn at a higher rate."""
    import torch

    backbone, heads = [], []
    for name, parameter in network.named_parameters():
        (backbone if name.startswith("layer") else heads).append(parameter)
    rate = optimizer.learning_rate
    groups = [{"params": backbone}, {"params": heads, "lr": rate * optimizer.head_multiplier}]
    return torch.optim.SGD(groups, rate, optimizer.momentum, weight_decay=optimizer.weight_decay)
