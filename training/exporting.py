"""A trained policy as an ONNX file (https://onnx.ai): it runs without Shoal, without torch, on whatever has a runtime.

One input, ``observation`` ``[N, *shape]``: what the environment shows, laid out as docs/tasks.md says, of the dtype
float32 or uint8, *not* normalised: the file normalises. One output, ``action`` ``[N, …]``: the likeliest action, as the
environment takes it, so numbers begin where its space begins, and boxes are scaled to their bounds and clipped. In
float64 and in this order, as Shoal does it, so that actions are the same bits where the network's outputs are. For a
Dict or Tuple of actions there is an output for each of its parts: ``action/KEY``, ``action/KEY/0``.

A policy that remembers has a second input, ``memory`` ``[N, memory_size]``, zeros where an episode begins, and a second
output, ``next_memory``, which is that of the next step.

The graph is written by hand from what the models compute (`shoal.training.models`), by operators of opset 17 alone.
Needs the extra ``export``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal import __version__
from shoal.protocol.errors import UsageError
from shoal.training.algorithms.normalizers import CLIP
from shoal.training.models.actor_critic import ActorCritic
from shoal.training.models.policy import Recurrent
from shoal.training.models.q_network import QNetwork
from shoal.training.models.recurrent import RecurrentActorCritic
from shoal.training.models.soft_actor import SoftActorCritics
from shoal.training.tasks import Task
from shoal.training.tasks.base import ActionSpace, Continuous, Discrete, MultiDiscrete
from shoal.training.tasks.gym import GymTask
from shoal.training.tasks.spaces import ToEnv
from shoal.training.trained import Trained

OPSET: Final = 17
IR_VERSION: Final = 8


def export_onnx(trained: Trained, path: Path) -> None:
    """Write it.

    Raises:
        UsageError: if the package ``onnx`` is not installed, or no such graph is known of this policy.
        OSError: if it cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageError("exports need the package onnx: pip install 'shoal[export]'") from error
    graph = _Graph(onnx)
    box = trained.task.observation_space
    seen = "observation"
    if trained.normal is not None:
        mean, scale = trained.normal
        centred = graph.add("Mul", graph.add("Sub", seen, graph.constant(mean)), graph.constant(scale))
        seen = graph.add("Clip", centred, graph.constant(np.float32(-CLIP)), graph.constant(np.float32(CLIP)))
    elif box.dtype == "uint8":
        seen = graph.add("Mul", graph.cast(seen, np.float32), graph.constant(np.float32(1 / 255)))
    actions = _to_env(graph, _actions(graph, trained, seen), trained.task)
    for name, value in actions.items():
        graph.node("Identity", [value], [name])
    helper, kinds = onnx.helper, onnx.TensorProto
    kind = kinds.UINT8 if box.dtype == "uint8" else kinds.FLOAT
    inputs = [helper.make_tensor_value_info("observation", kind, ["N", *box.shape])]
    outputs = [onnx.ValueInfoProto(name=name) for name in actions]
    if isinstance(trained.model, Recurrent):
        inputs.append(helper.make_tensor_value_info("memory", kinds.FLOAT, ["N", trained.model.memory_size]))
        outputs.append(onnx.ValueInfoProto(name="next_memory"))
    made = helper.make_graph(graph.nodes, "policy", inputs, outputs, graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "shoal", __version__
    inferred = onnx.shape_inference.infer_shapes(model)
    helper.set_model_props(inferred, {"task": trained.manifest.task, "algorithm": trained.manifest.algorithm})
    onnx.checker.check_model(inferred, full_check=True)
    half = path.with_name(f".{path.name}.part")
    half.write_bytes(inferred.SerializeToString())
    half.replace(path)


class _Graph:
    """Nodes and constants, as they are added."""

    def __init__(self, onnx: Any) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._onnx = onnx
        self._numbers = itertools.count()

    def constant(self, value: npt.ArrayLike) -> str:
        name = f"c{next(self._numbers)}"
        self.constants.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        if np.ndim(value) == 0:
            self.constants[-1].ClearField("dims")
        return name

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self.nodes.append(self._onnx.helper.make_node(operator, list(inputs), list(outputs), **attributes))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{next(self._numbers)}"
        self.node(operator, inputs, [name], **attributes)
        return name

    def cast(self, value: str, dtype: npt.DTypeLike) -> str:
        return self.add("Cast", value, to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def columns(self, value: str, start: int, stop: int) -> str:
        """``[N, stop - start]`` of ``[N, …]``."""
        return self.add("Slice", value, *(self.constant(np.array([each])) for each in (start, stop, 1)))

    def linear(self, value: str, weight: npt.NDArray[Any], bias: npt.NDArray[Any]) -> str:
        """``[N, out]`` of ``[N, in]``, by weights ``[in, out]``."""
        return self.add("Add", self.add("MatMul", value, self.constant(weight)), self.constant(bias))


def _actions(graph: _Graph, trained: Trained, seen: str) -> str:
    """What the policy gives greedily, as `ToEnv` takes it."""
    model, space = trained.model, trained.task.action_space
    parameters, size = model.parameters, trained.task.observation_space.size
    match model:
        case ActorCritic():
            flat = graph.add("Reshape", seen, graph.constant(np.array([-1, size])))
            return _likeliest(graph, _tanh_layers(graph, flat, parameters), space)
        case RecurrentActorCritic():
            flat = graph.add("Reshape", seen, graph.constant(np.array([-1, size])))
            both = graph.add("Concat", flat, _remembered(graph, flat, parameters), axis=1)
            return _likeliest(graph, _tanh_layers(graph, both, parameters), space)
        case QNetwork():
            return _likeliest(graph, _dense(graph, seen, parameters, "q", size), space)
        case SoftActorCritics():
            outputs = _dense(graph, seen, parameters, "actor", size)
            width = _width(space)
            return graph.add("Tanh", graph.columns(outputs, 0, width))
    if type(model).__name__ == "ImagePolicy":
        features = _image(graph, seen, model)
        outputs = graph.linear(features, parameters["actor/weight"].T, parameters["actor/bias"])
        return _likeliest(graph, outputs, space)
    raise UsageError("this policy's network has no ONNX form here yet; `shoal play` shows what it does")


def _tanh_layers(graph: _Graph, seen: str, parameters: Any) -> str:
    """See `shoal.training.models.actor_critic`; of the actor alone."""
    outputs, layer = seen, 0
    while f"actor/{layer}/weight" in parameters:
        outputs = graph.add("Tanh", outputs) if layer else outputs
        weight, bias = parameters[f"actor/{layer}/weight"], parameters[f"actor/{layer}/bias"]
        outputs, layer = graph.linear(outputs, weight.T, bias), layer + 1
    return outputs


def _remembered(graph: _Graph, seen: str, parameters: Any) -> str:
    """What is remembered after a step; see `shoal.training.models.gated`."""
    given = graph.linear(seen, parameters["memory/in"].T, parameters["memory/in_bias"])
    added = graph.linear("memory", parameters["memory/again"].T, parameters["memory/again_bias"])
    width = parameters["memory/again"].shape[1]
    parts = ((0, width), (width, 2 * width), (2 * width, 3 * width))
    (reset, keep, new), (reset_added, keep_added, again) = (
        [graph.columns(each, *part) for part in parts] for each in (given, added)
    )
    reset, keep = (graph.add("Sigmoid", graph.add("Add", *pair)) for pair in ((reset, reset_added), (keep, keep_added)))
    new = graph.add("Tanh", graph.add("Add", new, graph.add("Mul", reset, again)))
    kept = graph.add("Mul", keep, graph.add("Sub", "memory", new))
    graph.node("Add", [new, kept], ["next_memory"])
    return "next_memory"


def _width(space: ActionSpace) -> int:
    """How many numbers a continuous action has.

    Raises:
        UsageError: if it is none.
    """
    if not isinstance(space, Continuous):
        raise UsageError("this policy gives numbers where its task takes choices; export one of the same task")
    return space.size


def _dense(graph: _Graph, seen: str, parameters: Any, prefix: str, size: int) -> str:
    """See `shoal.training.models.dense.Dense.of_one`."""
    outputs, layer = graph.add("Reshape", seen, graph.constant(np.array([-1, size]))), 0
    while f"{prefix}/{layer}/weight" in parameters:
        outputs = graph.add("Relu", outputs) if layer else outputs
        outputs = graph.linear(
            outputs, parameters[f"{prefix}/{layer}/weight"][0], parameters[f"{prefix}/{layer}/bias"][0]
        )
        layer += 1
    return outputs


def _image(graph: _Graph, seen: str, model: Any) -> str:
    """See `shoal.training.models.cnn`."""
    from shoal.training.models.cnn import IMPALA_STAGES, NATURE_STRIDES, Layout, Nature

    image, own = model.image, model.parameters
    if image.layout is Layout.NONE:
        seen = graph.add("Unsqueeze", seen, graph.constant(np.array([1])))
    elif image.layout is Layout.LAST:
        seen = graph.add("Transpose", seen, perm=[0, 3, 1, 2])

    def conv(name: str, value: str, **attributes: Any) -> str:
        return graph.add(
            "Conv", value, *(graph.constant(own[f"{name}/{each}"]) for each in ("weight", "bias")), **attributes
        )

    if isinstance(image, Nature):
        for number, stride in enumerate(NATURE_STRIDES):
            seen = graph.add("Relu", conv(f"see/{number}", seen, strides=[stride, stride]))
    else:
        same = {"pads": [1, 1, 1, 1]}
        for stage in range(IMPALA_STAGES):
            wide = conv(f"see/{stage}/in", seen, **same)
            seen = graph.add("MaxPool", wide, kernel_shape=[3, 3], strides=[2, 2], **same)
            for block in (0, 1):
                inner = conv(f"see/{stage}/{block}/0", graph.add("Relu", seen), **same)
                seen = graph.add("Add", seen, conv(f"see/{stage}/{block}/1", graph.add("Relu", inner), **same))
        seen = graph.add("Relu", seen)
    units = graph.linear(graph.add("Flatten", seen), own["see/units/weight"].T, own["see/units/bias"])
    return graph.add("Relu", units)


def _likeliest(graph: _Graph, outputs: str, space: ActionSpace) -> str:
    """See `shoal.training.models.heads.likeliest`."""
    match space:
        case Discrete():
            return graph.add("ArgMax", outputs, axis=1, keepdims=0)
        case MultiDiscrete(counts):
            ends = list(itertools.accumulate(counts))
            parts = [graph.columns(outputs, end - count, end) for count, end in zip(counts, ends, strict=True)]
            return graph.add("Concat", *(graph.add("ArgMax", part, axis=1, keepdims=1) for part in parts), axis=1)
        case Continuous():
            return outputs


def _to_env(graph: _Graph, actions: str, task: Task) -> dict[str, str]:
    """See `ToEnv`: values by outputs' names. Actions of tasks that are not Gymnasium's stay what the policy gives."""
    return _of_space(graph, actions, task.to_env, "action") if isinstance(task, GymTask) else {"action": actions}


def _of_space(graph: _Graph, actions: str, to_env: ToEnv, name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, place, inner in to_env.parts:
        part = graph.columns(actions, place.start, place.stop)
        if inner.start is not None:
            part = graph.add("Squeeze", part, graph.constant(np.array([1])))
        found |= _of_space(graph, part, inner, f"{name}/{key}")
    if to_env.parts:
        return found
    if to_env.start is not None:
        return {name: graph.add("Add", actions, graph.constant(np.int64(to_env.start)))}
    if to_env.first is not None:
        actions = graph.add("Add", actions, graph.constant(to_env.first))
    else:
        wide = graph.cast(actions, np.float64)
        scaled = graph.add("Mul", graph.constant(to_env.half_range), wide)
        scaled = graph.add("Add", graph.constant(to_env.middle), scaled)
        actions = graph.add("Max", scaled, graph.constant(to_env.low))
        actions = graph.add("Min", actions, graph.constant(to_env.high))
    actions = graph.cast(actions, to_env.dtype)
    return {name: graph.add("Reshape", actions, graph.constant(np.array([-1, *to_env.shape], np.int64)))}
