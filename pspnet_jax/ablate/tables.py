"""Tables of an ablation: rows, each a few changed fields of one base recipe, with the published scores beside them."""

import dataclasses
import hashlib
import re
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax.errors import UserError

BASES = {"ade20k": "ade20k", "scenes": "quickstart", "camvid": "camvid"}  # dataset: base recipe
SMALL = ("scenes", "camvid")  # datasets for one machine
MULTI_SCALE = {"eval.scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant."""

    changes: Mapping[str, Any]  # fields of the config in which it differs from the base recipe, such as {"model.bins": ()}
    published: tuple[float, float] | None = None  # mIoU and pixel accuracy in percent
    datasets: tuple[str, ...] = ()  # those for which the row exists; empty: all
    network: str = ""  # name of another row, whose network this one evaluates, changing only fields of config.eval


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of an ablation. A recipe that defines one as TABLE is a table for `python -m pspnet_jax.ablate`.

    Raises:
      ValueError: a name is empty, not that of a row, or has a comma, which separates a row from the dataset; or a row with
        `network` changes more than the evaluation, or names a row that is not trained itself.
    """

    rows: Mapping[str, Row]  # by name
    reference: str  # name of the row that the others are compared with
    order: tuple[tuple[str, str], ...] = ()  # pairs (better, worse) of rows: the comparisons that the publication makes
    bases: Mapping[str, str] = dataclasses.field(default_factory=lambda: BASES)  # of each dataset; the first is the default
    title: str = ""  # set by `load`: the first paragraph of the recipe's docstring

    def __post_init__(self) -> None:
        networks = {row.network for row in self.rows.values() if row.network}
        if unknown := {self.reference, *networks, *(name for pair in self.order for name in pair)} - {*self.rows}:
            raise ValueError(f"no row {min(unknown)!r}: expected one of {', '.join(self.rows)}")
        for name, row in self.rows.items():
            if not name or {*name} & {*",|\n"}:
                raise ValueError(f"row {name!r}: expected a name without a comma, a vertical bar or a line break")
            if row.network and not all(field.startswith("eval.") for field in row.changes):
                raise ValueError(f"row {name!r} evaluates the network of {row.network!r}: expected only changes of eval.*")
            if row.network and self.rows[row.network].network:
                raise ValueError(f"row {name!r}: expected as network a row that is trained, but {row.network!r} is not")

    @property
    def varied(self) -> set[str]:
        """The fields that any row changes."""
        return {field for row in self.rows.values() for field in row.changes}

    def of_dataset(self, dataset: str) -> "Table":
        """Returns the table with only the rows of a dataset, and with those comparisons whose rows are left."""
        if dataset not in self.bases:
            raise ValueError(f"no dataset {dataset!r}: expected one of {', '.join(self.bases)}")
        rows = {name: row for name, row in self.rows.items() if not row.datasets or dataset in row.datasets}
        return dataclasses.replace(self, rows=rows, order=tuple(pair for pair in self.order if {*pair} <= {*rows}))

    def changes(self, name: str) -> dict[str, Any]:
        """Returns the fields in which a row differs from the base recipe, with those of the row whose network it evaluates."""
        row = self.rows[name]
        return {**(self.changes(row.network) if row.network else {}), **row.changes}

    def get_config(self, argument: str = "") -> ConfigDict:
        """Returns the config of "ROW,DATASET"; by default, of the reference and of the first dataset.

        Its name consists of the changes, so that rows of several tables that are the same have the same name.

        Raises:
          ValueError: there is no such row or dataset, or the row changes a field that does not exist.
        """
        name, _, dataset = argument.partition(",")
        dataset = dataset or next(iter(self.bases))
        table = self.of_dataset(dataset)
        name = name or table.reference
        if name not in table.rows:
            raise ValueError(f"no row {name!r} for {dataset}: expected one of {', '.join(table.rows)}")
        config = configs.load_recipe(self.bases[dataset])
        base = dict(configs.leaves(config))
        if unknown := table.changes(name).keys() - base:
            raise ValueError(f"row {name!r} changes {min(unknown)}, which is not a field of the config; --help lists all")
        changes = {field: value for field, value in table.changes(name).items() if value != base.get(field)}
        config.update_from_flattened_dict(changes)
        config.name = "_".join((dataset, *(_words(field, value, base) for field, value in sorted(changes.items()))))
        return config


def _words(field: str, value: Any, fields: Iterable[str]) -> str:
    """Returns a change as a part of a file name: ("model.bins", (1, 2)) -> "bins-1-2".

    A field whose last word is also that of another of `fields` is written in full, and a value that is long or has other
    characters, such as a path, as a digest.
    """
    last = field.rpartition(".")[2]
    values = value if isinstance(value, tuple | list) else (value,)
    text = "-".join(map(str, values or ("none",)))
    if not re.fullmatch(r"[\w.+-]{1,40}", text):
        text = hashlib.sha256(text.encode()).hexdigest()[:10]
    is_unique = [other.rpartition(".")[2] for other in fields].count(last) == 1
    return f"{last if is_unique else field}-{text}"


def find(name: str) -> str:
    """Returns the recipe of a table, given the name of a table of this package, or the path of a file of the user's."""
    return name if name.endswith(".py") else f"ablations/{name}"


def load(name: str) -> Table:
    """Returns a table, see `find`. Raises UserError if there is none, or its file cannot be run as a recipe."""
    configs.load_recipe(find(name))  # refuses what is wrong
    recipe = runpy.run_path(str(configs.find_recipe(find(name))))
    if not isinstance(table := recipe.get("TABLE"), Table):
        raise UserError(f"{name}: defines no TABLE = Table(...) as configs/ablations/pooling.py does, so it is not an ablation")
    return dataclasses.replace(table, title=" ".join((recipe["__doc__"] or name).partition("\n\n")[0].split()))
