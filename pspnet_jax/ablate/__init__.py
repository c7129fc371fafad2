"""Ablations: tables of recipes that differ in a few fields, trained with several seeds and compared.

`tables` defines a table, `runs` trains its rows, `report` compares their scores, and `__main__` is the command line.
"""

from pspnet_jax.ablate.tables import Row, Table

__all__ = ["Row", "Table"]
