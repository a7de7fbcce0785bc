"""What is said where memory is refused."""

import numpy as np
import pytest

from tf_dist.errors import OutOfMemory, of_memory


class ResourceExhaustedError(Exception):
    """As TensorFlow's is called."""


@pytest.mark.parametrize(
    "error", [MemoryError(), ResourceExhaustedError("failed to allocate memory\nat node 7")]
)
def test_memory_that_is_refused_has_a_code_and_a_way_out(error):
    found = of_memory(error)
    assert isinstance(found, OutOfMemory) and found.exit_code == 71
    assert "--zero-stage 3" in str(found) and "node 7" not in str(found)


def test_numpy_says_how_much():
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert "EiB" in str(of_memory(caught.value))


def test_other_errors_stay_what_they_are():
    error = ValueError("no")
    assert of_memory(error) is error
