"""The table and the picture of a preflight."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Column, Table

from pspnet_jax.deploy.preflight import Row


def table(rows: Sequence[Row]) -> Table:
    """Returns a rich table with one row per topology."""
    found = Table("topology", *(Column(name, justify="right") for name in COLUMNS), caption=CAPTION)
    for row in rows:
        train, evaluate = row.train, row.evaluate
        counts = ", ".join(f"{count} {kind}" for kind, (count, _) in train.collectives.items())
        found.add_row(
            f"{row.topology}\n{row.chips} chips\n{row.cloud_name}",
            f"{row.images}",
            f"{train.state_bytes / 2**30:.2f}",
            f"{train.temporary_bytes / 2**30:.2f}",
            f"{train.total_bytes / 2**30:.2f} / {row.hbm_bytes / 2**30:.2f}",
            f"{row.largest}",
            f"{train.flops / 1e12:.2f}",
            f"{train.traffic_bytes / 1e9:.1f}",
            f"{1000 * row.step_seconds:.1f}",
            f"{row.images / row.step_seconds:,.0f}",
            counts,
            f"{sum(size for _, size in train.collectives.values()) / 1e6:.0f}",
            f"{evaluate.total_bytes / 2**30:.2f} with {row.windows} window(s)",
            f"{train.compile_seconds:.0f} + {evaluate.compile_seconds:.0f}",
        )
    return found


COLUMNS = (
    *("images per step", "state, GiB", "temporary, GiB", "all / HBM, GiB", "largest batch", "TFLOP", "traffic, GB", "ms"),
    *("images/s", "collectives", "MB in them", "evaluation: all, GiB", "compiled in, s"),
)
CAPTION = (
    "Of a train step, for each chip, as compiled; nothing was run. ms: least time that the chip's peak FLOP/s and memory "
    "bandwidth allow, without waiting for other chips; images/s: of the pod at this speed. largest batch: images per chip, "
    "or per group of parallel.spatial chips, of the largest step that was compiled and fits."
)


def plot(rows: Sequence[Row], name: str) -> Figure:
    """Draws the memory of a chip by topology, and the images/s that the roofline allows by the number of chips."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    memory_axes, speed_axes = figure.subplots(1, 2)
    names = [f"{row.topology}\n{row.images} images" for row in rows]
    state, temporary = ([part / 2**30 for part in parts] for parts in zip(*map(_parts, rows), strict=True))
    memory_axes.bar(names, state, label="state, batch and program")
    memory_axes.bar(names, temporary, bottom=state, label="temporary")
    memory_axes.scatter(names, [row.hbm_bytes / 2**30 for row in rows], marker="_", s=900, color="black", label="HBM of a chip")
    memory_axes.set_ylabel("GiB per chip")
    memory_axes.tick_params(axis="x", labelsize="small")
    memory_axes.legend()
    for generation in dict.fromkeys(row.topology.partition(":")[0] for row in rows):
        own = sorted((row.chips, row.images / row.step_seconds) for row in rows if row.topology.startswith(f"{generation}:"))
        speed_axes.loglog(*zip(*own, strict=True), marker="o", label=generation)
    speed_axes.set_xlabel("chips")
    speed_axes.set_ylabel("images/s, at most")
    speed_axes.legend()
    figure.suptitle(f"{name}: train step, as compiled for TPUs")
    return figure


def _parts(row: Row) -> tuple[int, int]:
    return row.train.total_bytes - row.train.temporary_bytes, row.train.temporary_bytes
