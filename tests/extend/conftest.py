import json

import pytest


@pytest.fixture
def logged(tmp_path):
    """Reads one metric from all training lines of the run in tmp_path."""

    def read(name):
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [line[name] for line in lines if line["kind"] == "train"]

    return read
