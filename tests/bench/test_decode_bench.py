"""The benchmark of decoding, on a model that tests can wait for."""

from tf_dist.bench import decode
from tf_dist.comm.transport.base import SerialComm


def test_both_ways_are_measured_and_shown(tmp_path):
    found = [
        decode.measure(SerialComm(), name, 8, rows) for name, rows in (("tiny-gpt", 1), ("tiny-lstm", 2))
    ]
    assert all(one["cached"] > 0 and one["uncached"] > 0 for one in found)
    head, first, second = decode.table(found).splitlines()
    assert head.split() == "model tokens rows cached tokens/s uncached tokens/s ratio".split()
    assert first.split()[:3] == ["tiny-gpt", "8", "1"] and second.split()[:3] == ["tiny-lstm", "8", "2"]
    assert decode.picture(found, tmp_path / "it.png").stat().st_size > 1000
