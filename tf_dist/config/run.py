"""`Config`: the options of all components of a run, and what they must be to each other."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from tf_dist.comm.health.hang_detector import StallOptions
from tf_dist.comm.runtime.launch_options import BackendOptions, ThreadOptions
from tf_dist.config.batch import BatchOptions
from tf_dist.config.checks import ConsistencyOptions, NumericOptions
from tf_dist.config.data import DataOptions
from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.config.loss import LossOptions
from tf_dist.config.media import MediaOptions
from tf_dist.config.model import ModelOptions
from tf_dist.config.optimizer import OptimizerOptions
from tf_dist.config.output import OutputOptions
from tf_dist.config.parallelism import ParallelismOptions
from tf_dist.config.performance import PerformanceOptions
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.config.recovery import CheckpointOptions, RecoveryOptions
from tf_dist.config.strategy import StrategyOptions
from tf_dist.config.task import TaskOptions
from tf_dist.config.transformer import TransformerOptions
from tf_dist.errors import UsageError
from tf_dist.options import Options
from tf_dist.strategies.base import Setting

Component = TypeVar("Component", bound=Options)


# A dataclass has the fields of its last base first: from data to output.
@dataclass(frozen=True)
class Config(
    OutputOptions,
    CheckpointOptions,
    ThreadOptions,
    StallOptions,
    RecoveryOptions,
    ConsistencyOptions,
    PerformanceOptions,
    BackendOptions,
    StrategyOptions,
    PipelineOptions,
    ParallelismOptions,
    NumericOptions,
    FineTuningOptions,
    OptimizerOptions,
    LossOptions,
    BatchOptions,
    TransformerOptions,
    ModelOptions,
    DataOptions,
    MediaOptions,
    TaskOptions,
):
    """One run: the options of its components, flat as flags and YAML files have them.

    Units: sizes in rows or tokens, rates per optimizer step, names as in the field. Defaults are
    attributes of the class, as in ``Config.seed``; `part` takes a component out.

    Raises:
        UsageError: a value is out of range, or two values cannot hold together.
    """

    def check(self) -> None:
        """Refuse what a component refuses, then components that do not fit each other."""
        for component in COMPONENTS:
            component.check(self)
        model = self.part(ModelOptions)
        self.check_model(model, self.task)
        parallelism = self.part(ParallelismOptions)
        parallelism.check_grid(model, self.part(TransformerOptions), self.part(PipelineOptions))
        self.check_documents(self.model, self.sequence_parallel)
        setting = Setting(parallelism.above_1, self.backend, self.optimizer.lower())
        self.check_setting(setting, self.on_spike)
        parallelism.check_backend(self.backend)
        if self.optimizer.lower() == "muon" and self.tensor_parallel > 1:
            raise UsageError(
                f"optimizer muon orthonormalises whole matrices, and tensor_parallel {self.tensor_parallel} "
                "divides them: use tensor_parallel 1, with pipeline_parallel or strategy zero"
            )

    def part(self, component: type[Component]) -> Component:
        """The options of one component, for instance ``config.part(ModelOptions)``."""
        assert component in COMPONENTS
        names = [field.name for field in dataclasses.fields(component)]  # type: ignore[arg-type]
        return component(**{name: getattr(self, name) for name in names})

    def as_dict(self) -> dict[str, Any]:
        """Every field as plain JSON and YAML values, in the order of declaration."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def as_yaml(self) -> str:
        """Every field as a YAML file that ``--config`` accepts."""
        text = io.StringIO()
        yaml.safe_dump(self.as_dict(), text, sort_keys=False, allow_unicode=True)
        return text.getvalue()


COMPONENTS: tuple[type[Options], ...] = Config.__bases__[::-1]
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def on_resume(*policies: str) -> tuple[str, ...]:
    """The names of options of which a resumed run may do so (`tf_dist.options.OnResume`)."""
    return tuple(name for name, field in FIELDS.items() if field.metadata["on_resume"] in policies)
