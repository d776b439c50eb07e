"""Parameters that are sharded or stored in a format: those that stay parameters give the plain numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qsim_core as qsim

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
RECIPE = {"weights": "int3", "activations": "int8"}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("before", [True, False])
def test_a_fully_sharded_model_has_the_plain_models_numbers(before: bool, mesh: object) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, sharded = perceptron(), perceptron()
    qsim.simulate(plain, **RECIPE, example=X)
    if before:
        fully_shard(sharded, mesh=mesh)  # type: ignore[arg-type]
    qsim.simulate(sharded, **RECIPE, example=X)
    if not before:
        fully_shard(sharded, mesh=mesh)  # type: ignore[arg-type]

    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in (plain, sharded)]
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(sharded(X), plain(X))
        step(plain, optimizers[0])
        step(sharded, optimizers[1])
    with torch.no_grad():
        assert torch.equal(sharded(X), plain(X))


@pytest.mark.filterwarnings("ignore")  # torch's own, about one process
@pytest.mark.parametrize("originals", [True, False])
def test_a_model_in_one_flat_parameter_is_refused(originals: bool, mesh: object) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrapped(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, use_orig_params=originals, device_id=torch.device("cpu"))

    with pytest.raises(qsim.ModelError, match=r"^1 is in FullyShardedDataParallel, .* weights; use fully_shard$"):
        qsim.simulate(nn.Sequential(nn.Identity(), wrapped(perceptron())), **RECIPE, example=X)

    simulated = perceptron()
    qsim.simulate(simulated, **RECIPE, example=X)
    with pytest.raises(qsim.QsimError, match=r"^0.weight was a parameter, and a plain tensor stands in its place now"):
        wrapped(simulated)(X)


def emptied(model: nn.Sequential) -> nn.Sequential:
    """Keep the weights elsewhere between forwards, as DeepSpeed's ZeRO-3 does."""
    for layer in (model[0], model[2]):
        whole = {parameter: parameter.data for parameter in layer.parameters()}

        def fill(layer: nn.Module, x: object, whole: dict[nn.Parameter, torch.Tensor] = whole) -> None:
            for parameter, data in whole.items():
                parameter.data = data.clone()

        def empty(layer: nn.Module, x: object, y: object, whole: dict[nn.Parameter, torch.Tensor] = whole) -> None:
            for number, parameter in enumerate(whole):
                parameter.data, parameter.ds_id = torch.empty(0), number  # type: ignore[attr-defined]

        empty(layer, None, None)
        layer.register_forward_pre_hook(fill)
        layer.register_forward_hook(empty)
    return model


def test_parameters_that_are_empty_between_forwards_give_the_plain_numbers_if_simulated_before() -> None:
    plain, sharded = perceptron(), perceptron()
    for model in (plain, sharded):
        qsim.simulate(model, **RECIPE, example=X)

    emptied(sharded)

    with torch.no_grad():
        assert torch.equal(sharded(X), plain(X))
        assert torch.equal(sharded(X), plain(X))


def test_parameters_that_are_empty_already_are_refused() -> None:
    with pytest.raises(qsim.ModelError, match=r"^0 has weights that DeepSpeed's ZeRO-3 empties between forwards; sim"):
        qsim.simulate(emptied(perceptron()), **RECIPE, example=X)


def test_tensor_parallel_is_refused(mesh: object) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = parallelize_module(perceptron(), mesh, {"0": ColwiseParallel()})  # type: ignore[arg-type]

    with pytest.raises(qsim.QsimError, match=r"^a linear in 0 has an operand of class DTensor, whose values are"):
        qsim.simulate(model, **RECIPE, example=X)


def test_weights_stored_by_torchao_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = perceptron()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    with pytest.raises(qsim.QsimError, match=r"^a linear in 0 has an operand of class \w+Tensor, whose values are"):
        qsim.simulate(model, **RECIPE, example=X)


def test_transforms_name_weights_that_are_stored_in_float8() -> None:
    model = perceptron()
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    model[0].register_forward_pre_hook(lambda layer, x: setattr(layer.weight, "data", layer.weight.data.float()))
    model[0].register_forward_hook(
        lambda layer, x, y: setattr(layer.weight, "data", layer.weight.data.to(torch.float8_e4m3fn))
    )

    with pytest.raises(qsim.RecipeError, match=r"^0.weight is stored as float8_e4m3fn; transforms change values"):
        qsim.simulate(model, weights="int4", transforms=["gptq"], example=X, calibration=[X])
