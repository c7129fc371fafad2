"""The config of our own format: whose it is, and what a stranger's file may hold instead."""

import json
import pathlib

import pytest
from etils import epath

from pspnet_jax.weights import own

CONFIG = {"library_name": own.LIBRARY, "of": "model.safetensors"}


def write(path: pathlib.Path, header: str) -> epath.Path:
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode())
    return epath.Path(path)


def test_config_json_describes_model_safetensors_alone(tmp_path):
    (tmp_path / own.CONFIG).write_text(json.dumps(CONFIG))
    header = json.dumps({"__metadata__": {own.LIBRARY: json.dumps({"of": "the file"})}})
    assert own.read_config(write(tmp_path / own.WEIGHTS, header)) == CONFIG
    assert own.read_config(write(tmp_path / "other.safetensors", header)) == {"of": "the file"}
    assert own.read_config(write(tmp_path / "stranger.safetensors", "{}")) == {}


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "header",
    ["[]", DEEP, "{", '{"__metadata__": 3}', *(json.dumps({"__metadata__": {own.LIBRARY: v}}) for v in (3, "[]", "x", DEEP))],
)
def test_a_strangers_metadata_may_be_anything(header, tmp_path):
    (tmp_path / own.CONFIG).write_text(DEEP)
    assert own.read_config(write(tmp_path / own.WEIGHTS, header)) == {}
