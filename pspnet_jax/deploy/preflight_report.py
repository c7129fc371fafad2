"""The table and the picture of a preflight."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from rich.table import Column, Table

from pspnet_jax.deploy.preflight import Row


def table(rows: Sequence[Row]) -> Table:
    """Returns a rich table with one column per topology."""
    found = Table("per chip", *(Column(f"{row.topology}\n{row.cloud_name}", justify="right") for row in rows), caption=CAPTION)
    for name, show in FIGURES:
        found.add_row(name, *map(show, rows))
    return found


def _collectives(row: Row) -> str:
    return "\n".join(f"{count} {kind}, {size / 1e6:,.1f} MB" for kind, (count, size) in row.train.collectives.items())


GIB = 2**30
FIGURES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("chips", lambda row: f"{row.chips}"),
    ("HBM, GiB", lambda row: f"{row.hbm_bytes / GIB:.2f}"),
    ("train step: images on all chips", lambda row: f"{row.images}"),
    ("  weights and optimizer, GiB", lambda row: f"{row.train.state_bytes / GIB:.2f}"),
    ("  temporary memory, GiB", lambda row: f"{row.train.temporary_bytes / GIB:.2f}"),
    ("  all memory, GiB", lambda row: f"{row.train.total_bytes / GIB:.2f}"),
    ("  largest number of images", lambda row: f"{row.largest}"),
    ("  work, TFLOP", lambda row: f"{row.train.flops / 1e12:.2f}"),
    ("  memory traffic, GB", lambda row: f"{row.train.traffic_bytes / 1e9:.1f}"),
    ("  roofline, ms", lambda row: f"{1000 * row.step_seconds:.1f}"),
    ("  images/s of all chips at the roofline", lambda row: f"{row.images / row.step_seconds:,.0f}"),
    ("  collectives", _collectives),
    ("  compiled in, s", lambda row: f"{row.train.compile_seconds:.0f}"),
    ("evaluation: windows in a pass", lambda row: f"{row.windows}"),
    ("  all memory, GiB", lambda row: f"{row.evaluate.total_bytes / GIB:.2f}"),
    ("  compiled in, s", lambda row: f"{row.evaluate.compile_seconds:.0f}"),
)
CAPTION = (
    "As compiled; nothing was run. Roofline: the least time that the peak FLOP/s and the memory bandwidth of a chip allow, "
    "without waiting for other chips. Largest number of images: of a step that was compiled and fits. With parallel.spatial=n, "
    "images and windows are those of n chips."
)


def plot(rows: Sequence[Row], name: str) -> Figure:
    """Draws the memory of a chip by topology, and the images/s that the roofline allows by the number of chips."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    memory_axes, speed_axes = figure.subplots(1, 2)
    names = [f"{row.topology}\n{row.images} images" for row in rows]
    temporary = [row.train.temporary_bytes / GIB for row in rows]
    state = [(row.train.total_bytes - row.train.temporary_bytes) / GIB for row in rows]
    memory_axes.bar(names, state, label="state, batch and program")
    memory_axes.bar(names, temporary, bottom=state, label="temporary")
    memory_axes.scatter(names, [row.hbm_bytes / GIB for row in rows], marker="_", s=900, color="black", label="HBM of a chip")
    memory_axes.set_ylabel("GiB per chip")
    memory_axes.tick_params(axis="x", labelsize="small")
    memory_axes.margins(y=0.3)  # room for the legend
    memory_axes.legend(loc="upper center", ncols=3, fontsize="small")
    for generation in dict.fromkeys(row.topology.partition(":")[0] for row in rows):
        own = sorted((row.chips, row.images / row.step_seconds) for row in rows if row.topology.startswith(f"{generation}:"))
        speed_axes.loglog(*zip(*own, strict=True), marker="o", label=generation)
    speed_axes.set_xscale("log", base=2)
    speed_axes.set_xlabel("chips")
    speed_axes.set_ylabel("images/s, at most")
    speed_axes.legend()
    figure.suptitle(f"{name}: train step, as compiled for TPUs")
    return figure
