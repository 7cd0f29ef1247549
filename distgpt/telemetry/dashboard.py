"""The tags of a run in TensorBoard, the layout of its custom scalars, and its config as hyperparameters.

TensorBoard sorts groups of tags by name: loss comes first, time last. Names end in their unit.
"""

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

TRAIN_LOSS, VALIDATION_LOSS = "loss/train_nats_per_token", "loss/validation_nats_per_token"
THROUGHPUT, MFU, GOODPUT = "speed/tokens_per_second", "speed/mfu_percent", "time/goodput_percent"
# The figures of a logged step, each with its tag and scale.
STEP_TAGS = {
    "loss": (TRAIN_LOSS, 1.0),
    "lr": ("optim/learning_rate", 1.0),
    "grad_norm": ("optim/grad_norm", 1.0),
    "loss_z": ("optim/loss_z", 1.0),
    "grad_norm_z": ("optim/grad_norm_z", 1.0),
    "skipped": ("optim/skipped", 1.0),
    "tokens_per_second": (THROUGHPUT, 1.0),
    "mfu": (MFU, 100.0),
    "seconds": ("speed/step_ms", 1e3),
    "memory_bytes": ("speed/memory_gib", 2.0**-30),
    "data_wait": ("speed/data_wait_s", 1.0),
    "checkpoint_stall": ("speed/checkpoint_stall_s", 1.0),
}
# Charts of the custom scalars, by category: their tags.
LAYOUT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Loss": {"training and validation loss (nats per token)": (TRAIN_LOSS, VALIDATION_LOSS)},
    "Speed": {"throughput (tokens per second)": (THROUGHPUT,), "MFU (percent)": (MFU,)},
    "Optimizer": {"learning rate": ("optim/learning_rate",), "gradient norm": ("optim/grad_norm",)},
    "Goodput": {"goodput (percent of the time)": (GOODPUT,)},
}
# How a hyperparameter is stored, by its type; numbers otherwise.
STORED_AS = {
    str: ("string_value", api_pb2.DATA_TYPE_STRING),
    bool: ("bool_value", api_pb2.DATA_TYPE_BOOL),
}
NUMBER = ("number_value", api_pb2.DATA_TYPE_FLOAT64)
# Figures whose last values are compared between runs.
FINAL_TAGS = (VALIDATION_LOSS, TRAIN_LOSS, THROUGHPUT, MFU, GOODPUT)


def step_scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a logged step by tag, without those that are None."""
    tags = ((tag, figures[name], scale) for name, (tag, scale) in STEP_TAGS.items())
    return {tag: value * scale for tag, value, scale in tags if value is not None}


def evaluation_scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return the results of an evaluation by tag. "loss/NAME" is the loss of one dataset of several."""
    return {
        VALIDATION_LOSS + name.removeprefix("loss") if name.startswith("loss") else f"loss/validation_{name}": value
        for name, value in values.items()
    }


def layout() -> Summary:
    """Return the layout of the custom scalars: loss first, goodput last."""
    categories = [
        layout_pb2.Category(
            title=category,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{t}$" for t in tags]))
                for title, tags in charts.items()
            ],
        )
        for category, charts in LAYOUT.items()
    ]
    content = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=layout_metadata.PLUGIN_NAME))
    return Summary(value=[Summary.Value(tag=layout_metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata)])


def hyperparameters(values: Mapping[str, Any], *, group: str) -> Summary:
    """Return the hyperparameters of a run. `group`: a name of the run, the same for all its attempts."""
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in FINAL_TAGS]
    experiment = api_pb2.Experiment(metric_infos=metrics)
    start = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=time.time())
    for name, value in values.items():
        field, kind = STORED_AS.get(type(value), NUMBER)
        experiment.hparam_infos.add(name=name, type=kind)
        setattr(start.hparams[name], field, value)
    records = (
        _hparams_value(hparams_metadata.EXPERIMENT_TAG, experiment=experiment),
        _hparams_value(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=start),
    )
    return Summary(value=records)


def training_done() -> Summary:
    """Return the record that a run has reached its last step."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return Summary(value=[_hparams_value(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)])


def _hparams_value(tag: str, **content: Any) -> Any:
    data = plugin_data_pb2.HParamsPluginData(version=hparams_metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(plugin_name=hparams_metadata.PLUGIN_NAME, content=data.SerializeToString())
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)
