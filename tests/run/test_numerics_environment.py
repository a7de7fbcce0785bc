import pytest

from tf_dist.run import numerics_environment
from tf_dist.run.numerics_environment import bits_depend_on, changes, slow_bfloat16


def test_what_bits_depend_on_is_named(monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    found = bits_depend_on()
    assert {"keras", "numpy", "XLA", "instruction sets"} <= set(found)
    assert (found["threads per rank"], found["oneDNN"]) == ("3", "off")
    assert changes(found, bits_depend_on()) == []


def test_changes_are_named_with_both_values():
    before, now = (
        {"keras": "3.14", "oneDNN": "on", "gone": "1"},
        {"keras": "3.15", "oneDNN": "on", "new": "2"},
    )
    assert changes(before, now) == ["keras: 3.14 -> 3.15", "new: not there -> 2", "gone: 1 -> not there"]


@pytest.mark.parametrize(
    ("sets", "onednn", "said"),
    [
        (["avx2", "avx512_bf16"], "1", ""),
        (["asimd", "bf16"], "1", ""),
        (["avx2", "avx512f"], "1", "no instructions"),
        (["avx2", "amx_bf16"], "0", "oneDNN is off"),
        ([], "1", ""),  # unknown: nothing is said
    ],
)
def test_where_bfloat16_gains_nothing(monkeypatch, sets, onednn, said):
    monkeypatch.setattr(numerics_environment, "_instruction_sets", lambda: sets)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", onednn)
    found = slow_bfloat16()
    assert said in found
    assert bool(said) == bool(found)
