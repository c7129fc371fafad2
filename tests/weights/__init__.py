"""Helpers of the tests of weights files."""

from collections.abc import Callable

import pytest

from pspnet_jax.errors import UserError


def refusal(function: Callable[[object], object], name: object) -> str:
    """Calls a function that has to refuse a file in one sentence, and returns what follows the file's name in it."""
    with pytest.raises(UserError) as error:
        function(name)
    message = str(error.value)
    print(message)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    return message.removeprefix(f"{name}: ")
