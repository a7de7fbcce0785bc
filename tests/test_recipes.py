"""`--config NAME` of a configuration that comes with the package."""

from pathlib import Path

import pytest

from tf_dist import recipes
from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.flags import from_command_line
from tf_dist.ops.hostfile import ranks_of_a_model

DATA = Path(__file__).parents[1] / "data"


def test_every_name_is_a_configuration_of_the_folder_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in recipes.NAMES:
        by_name, by_path = (
            from_command_line(["--config", config], "")[0] for config in (name, str(DATA / f"{name}.yaml"))
        )
        assert by_name == by_path
    assert from_command_line(["--config", "nanogpt", "--steps", "7"], "")[0].steps == 7


def test_what_lies_there_is_meant_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nanogpt").write_text("tensor_parallel: 2\n")
    assert recipes.config_file("nanogpt") == "nanogpt"
    assert from_command_line(["--config", "nanogpt"], "")[0].tensor_parallel == 2
    assert ranks_of_a_model(["scripts/train.py", "--config", "nanogpt"]) == 2


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_a_preset_lies_below_a_file_and_flags(name, tmp_path):
    plain, preset = Config(), from_command_line(["--preset", name], "")[0]
    assert preset != plain
    file = tmp_path / "run.yaml"
    file.write_text("layers: 7\n")
    both = from_command_line(["--preset", name, "--config", str(file), "--width", "96"], "")[0]
    assert (both.layers, both.width) == (7, 96)
    assert both.activation == preset.activation and both.normalization == preset.normalization


def test_every_preset_of_the_folder_has_a_name_and_no_other_is_known():
    files = {path.stem for path in (DATA / "presets").glob("*.yaml")}
    assert files | {"nanogpt-cpu"} == set(recipes.PRESETS)
    with pytest.raises(UsageError, match=r"no preset 'lama': .*Did you mean 'llama'"):
        from_command_line(["--preset", "lama"], "")
