"""Models in ONNX: a weight is a DequantizeLinear of its codes, a static input a QuantizeLinear and a DequantizeLinear.

Inputs whose scale is found in each forward are divided, rounded and multiplied by plain nodes: DynamicQuantizeLinear
has other scales, and QuantizeLinear none for each token.
torch.onnx writes the graph in float32. The initializer of each packed weight gives way to a node of the same name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qsim_core.components.host import installed
from qsim_core.errors import ModelError, RecipeError, one_line
from qsim_core.formats.format import Format
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_interop.writing.bit_patterns import is_format, nibbles
from qsim_interop.writing.layer import Layer
from qsim_interop.writing.source import Source
from qsim_interop.writing.target import Target

LOWEST_OPSET = 18
"""The lowest that torch.onnx writes; 8-bit integers need less."""
OPSETS = {"INT8": 18, "UINT8": 18, "FLOAT8E4M3FN": 19, "INT4": 21, "UINT4": 21, "FLOAT4E2M1": 23}
"""The opset from which DequantizeLinear takes a type. ONNX 1.23, Operators.md."""
BLOCKS = 21
"""The opset from which it takes `block_size`."""
INLINE = 1 << 30
"""Bytes of the largest file with the tensors in it; a larger one has them beside it, as protobuf holds 2 GB."""


class ONNX(Target):
    """Integers of 2 to 8 bits, E4M3, E2M1."""

    name: ClassVar[str] = "onnx"
    kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    library: ClassVar[str | None] = "onnx"
    holds: ClassVar[str] = "integers of 2 to 8 bits, e4m3 and e2m1 by tensor, channel or block(F, n)"

    def need_library(self) -> None:
        super().need_library()
        if find_spec("onnxscript") is None:
            raise RecipeError("--to onnx needs onnxscript, with which torch writes the graph; pip install onnxscript")

    def check(self, source: Source) -> list[str]:
        for layer in source.layers:
            if isinstance(layer.scheme.granularity, tuple):
                raise self.refused(layer, "it has no tiles")
            if _type_of(layer.element) is None:
                raise self.refused(layer)
            _ = layer.block
            if layer.inputs is not None and not _is_held(layer.inputs):
                raise RecipeError(
                    f"{layer.module}: the nodes of ONNX that are written do not compute {layer.inputs} exactly; they "
                    f"take inputs with one static scale, like tensor(int8, static=true), symmetric integers and e4m3 "
                    f"by token or tensor, or none (activations: none)"
                )
        return []

    def write(self, source: Source, directory: Path) -> None:
        import onnx

        model = _graph(source, max(map(_opset, source.layers)))
        for layer in source.layers:
            _pack(model.graph, layer)
        _in_order(model.graph)
        onnx.checker.check_model(model)
        beside = model.ByteSize() > INLINE
        onnx.save(model, directory / "model.onnx", save_as_external_data=beside, location="model.onnx.data")


def _type_of(element: Format) -> str | None:
    """The smallest type of ONNX that has the values of a format; None: there is none."""
    if element.is_integer and element.width <= 8:
        return f"{'INT' if element.min < 0 else 'UINT'}{4 if element.width <= 4 else 8}"
    return "FLOAT8E4M3FN" if is_format(element, "e4m3") else "FLOAT4E2M1" if is_format(element, "e2m1") else None


def _opset(layer: Layer) -> int:
    """The lowest opset that holds a layer."""
    formats = [layer.element]
    if layer.inputs is not None and not (_is_found(layer.inputs) and layer.inputs.plain.coded.is_integer):
        formats.append(layer.inputs.plain.coded)  # numbers stand for the codes of integers whose scale is found
    needed = [OPSETS[str(_type_of(one))] for one in formats]
    return max(LOWEST_OPSET, *needed, BLOCKS if layer.block is not None else 0)


def _is_found(quantizer: Any) -> bool:
    """Tell if the scale of inputs is found in each forward, for a token or the tensor, and nodes compute it."""
    shared, element = quantizer.granularity, getattr(quantizer.plain, "coded", None)
    known = shared in ("token", "tensor") and element is not None and _type_of(element) is not None
    if isinstance(quantizer, StaticScheme) or not known or is_format(element, "e2m1"):
        return False
    return bool(quantizer.plain == installed().parse(f"{shared}({element})"))


def _is_held(quantizer: Any) -> bool:
    return _is_found(quantizer) or (
        isinstance(quantizer, StaticScheme)
        and quantizer.granularity == "tensor"
        and quantizer.scheme.coded.rounding == "even"
        and _type_of(quantizer.scheme.coded) is not None
    )


def _graph(source: Source, opset: int) -> Any:
    """The model in float32, as torch.onnx writes it. Raises `ModelError`."""
    args, kwargs = _arguments(source)
    shapes: Any = tuple(map(_any_size, args)) if args else {name: _any_size(value) for name, value in kwargs.items()}
    try:
        program: Any = torch.onnx.export(
            _unhooked(source),
            args,
            kwargs=kwargs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            optimize=False,
            verbose=False,
        )
    except Exception as error:  # of any class: it traces the model's own code
        raise ModelError(f"torch.onnx cannot write this model: {one_line(error)}") from None
    return program.model_proto


def _arguments(source: Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and keyword arguments. A batch of one is doubled: torch leaves no axis of 1 open."""
    example: Any = source.simulation.example
    if isinstance(example, Mapping):
        cached = {"use_cache": False} if hasattr(getattr(source.model, "config", None), "use_cache") else {}
        single = all(len(value) == 1 for value in example.values() if _is_tensor(value) and value.dim())
        return (), {
            name: torch.cat([value.cpu()] * (1 + single)) if _is_tensor(value) and value.dim() else value
            for name, value in (dict(example) | cached).items()
        }
    return (tuple(example) if isinstance(example, tuple) else (example,)), {}


def _any_size(value: Any) -> Any:
    """Leave the size of each axis open, where the model's own code does; None for what is not a tensor."""
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if _is_tensor(value) else None


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _unhooked(source: Source) -> nn.Module:
    """A copy of the model without the simulation, and with the values of the packed weights."""
    copied = copy.deepcopy(source.simulation)
    model = copied.restore().cpu().eval()
    state = source.model.state_dict()
    state |= {layer.weight.name: layer.weight.decode() for layer in source.layers}
    model.load_state_dict(state)
    return model


def _pack(graph: Any, layer: Layer) -> None:
    """Replace a weight's initializer by its dequantized codes, and quantize the inputs of its product."""
    name = layer.weight.name
    place = next((place for place, one in enumerate(graph.initializer) if one.name == name), None)
    if place is None:
        raise ModelError(f"torch.onnx has left no initializer of the name {name}")
    del graph.initializer[place]
    if layer.inputs is not None:
        for product in _products(graph, name):
            product.input[0] = _quantized(graph, product.input[0], layer)
    if layer.has_nested_scales and layer.block:
        inner = _initializer(graph, f"{name}_scale_codes", "FLOAT8E4M3FN", _as_weight(layer, layer.scale_codes))
        outer = _initializer(graph, f"{name}_global_scale", "FLOAT", layer.global_scale.reshape(()))
        scales = _node(graph, "DequantizeLinear", [inner, outer], f"{name}_scale")
    else:
        scales = _initializer(graph, f"{name}_scale", "FLOAT", _shaped(layer, layer.scales))
    kind = str(_type_of(layer.element))
    codes = _as_weight(layer, layer.numbers if layer.element.is_integer else layer.codes)
    inputs = [_initializer(graph, f"{name}_codes", kind, codes), scales]
    if layer.zero_points is not None:
        inputs.append(_initializer(graph, f"{name}_zero_point", kind, _shaped(layer, layer.zero_points)))
    blocks = {"block_size": layer.block} if layer.block else {}
    along = (layer.block is not None) != layer.transposed
    axis = {} if layer.scheme.granularity == "tensor" else {"axis": int(along)}
    _node(graph, "DequantizeLinear", inputs, name, **axis, **blocks)


def _as_weight(layer: Layer, rows: Tensor) -> Tensor:
    """Rows of a weight as its module has them: in columns if it stores the weight transposed."""
    return rows.T if layer.transposed else rows


def _shaped(layer: Layer, per_block: Tensor) -> Tensor:
    """Scales or zero points in the shape that DequantizeLinear wants: one number, one axis, or the weight's axes."""
    if layer.scheme.granularity == "tensor":
        return per_block.reshape(())
    return _as_weight(layer, per_block) if layer.block else per_block.reshape(-1)


def _products(graph: Any, weight: str) -> list[Any]:
    """The nodes that multiply by a weight, transposed or not. Raises `ModelError` for any other node that reads it."""
    found = []
    for node in graph.node:
        if weight in node.input and node.op_type == "Transpose":
            found += _products(graph, node.output[0])
        elif weight in node.input:
            if node.op_type not in ("MatMul", "Gemm") or node.input[1] != weight:
                raise ModelError(f"{weight} is read by a node {node.op_type}, whose inputs cannot be quantized")
            found.append(node)
    return found


def _quantized(graph: Any, x: str, layer: Layer) -> str:
    """Add the nodes that quantize and dequantize a tensor under a layer's scale; give the result's name."""
    if _is_found(layer.inputs):
        return _rounded(graph, x, layer)
    held: StaticScheme = layer.inputs
    element, where = held.scheme.coded, f"{layer.module}_input"
    scale = _initializer(graph, f"{where}_scale", "FLOAT", held.scale.detach().cpu().reshape(()))
    kind = str(_type_of(element))
    zero = torch.zeros(()) if held.zero is None else held.zero.cpu().reshape(())
    given = [scale, _initializer(graph, f"{where}_zero_point", kind, zero)]
    width = 4 if kind.endswith("4") else 8
    if element.is_integer and (element.min, element.max) not in (
        (-(2 ** (width - 1)), 2 ** (width - 1) - 1),
        (0, 2**width - 1),
    ):
        ends = torch.tensor([element.min, element.max]) - zero
        low, high = (ends * held.scale.detach().cpu().reshape(())).unbind()
        limits = [
            _initializer(graph, f"{where}_{end}", "FLOAT", limit) for end, limit in (("low", low), ("high", high))
        ]
        x = _node(graph, "Clip", [x, *limits], f"{where}_clipped")
    codes = _node(graph, "QuantizeLinear", [x, *given], f"{where}_codes")
    return _node(graph, "DequantizeLinear", [codes, *given], f"{where}_values")


def _rounded(graph: Any, x: str, layer: Layer) -> str:
    """Add the nodes that find the scale of each row, or of the tensor, and round under it; give the result's name.

    A scale is the largest magnitude over the format's largest value, and values are rounded to even, in float32.
    """
    import onnx

    scheme, where = layer.inputs.plain, f"{layer.module}_input"
    element = scheme.coded

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        return _node(graph, kind, inputs, f"{where}_{name}", **attributes)

    def number(name: str, value: float) -> str:
        return _initializer(graph, f"{where}_{name}", "FLOAT", torch.tensor(value))

    axes = _initializer(graph, f"{where}_axes", "INT64", torch.tensor([-1]))
    along = [axes] if scheme.granularity == "token" else []
    largest = node("ReduceMax", [node("Abs", [x], "magnitudes"), *along], "largest", keepdims=1)
    scale = node("Div", [largest, number("max", element.max)], "scale")
    zero = node("Equal", [scale, number("zero", 0.0)], "is_zero")
    units = node("Div", [x, node("Where", [zero, number("one", 1.0), scale], "divisor")], "units")
    if element.is_integer:
        whole = node("Round", [units], "rounded")
        values = node("Clip", [whole, number("low", element.min), number("high", element.max)], "codes")
    else:
        codes = node("Cast", [units], "codes", to=onnx.TensorProto.FLOAT8E4M3FN)
        values = node("Cast", [codes], "wide", to=onnx.TensorProto.FLOAT)
    return node("Mul", [values, scale], "values")


def _node(graph: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
    """Add a node with one output."""
    import onnx

    graph.node.append(onnx.helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes))
    return output


def _initializer(graph: Any, name: str, kind: str, values: Tensor) -> str:
    """Add a tensor: numbers of an integer type or float32, bit patterns of a smaller float."""
    import onnx

    dtype = {"FLOAT": torch.float32, "INT8": torch.int8, "INT4": torch.int8, "INT64": torch.int64}.get(
        kind, torch.uint8
    )
    shape, stored = values.shape, values.to(dtype).contiguous()
    if kind in ("INT4", "UINT4", "FLOAT4E2M1"):
        flat = stored.flatten().view(torch.uint8) & 15
        stored = nibbles(torch.nn.functional.pad(flat, (0, flat.numel() % 2)))
    octets = stored.numpy().tobytes()
    graph.initializer.append(
        onnx.helper.make_tensor(name, getattr(onnx.TensorProto, kind), list(shape), octets, raw=True)
    )
    return name


def _in_order(graph: Any) -> None:
    """Put each node after those whose results it reads."""
    made = {one.name for one in (*graph.initializer, *graph.input)}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if all(not name or name in made for name in node.input)]
        made |= {name for node in ready for name in node.output}
        ordered += ready
        waiting = [node for node in waiting if node not in ready]
    del graph.node[:]
    graph.node.extend(ordered)
