from tf_dist.training.environment import bits_depend_on, changes


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
