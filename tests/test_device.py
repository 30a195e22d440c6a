"""Names of devices and types of forwards, and the stand-in for an accelerator, which refuses what it should."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from impq_core.config import RunConfig
from impq_core.doctor import examine
from impq_core.documents.forecasts import DeviceDocument, ForecastDocument
from impq_core.errors import ImpqError, UsageError
from impq_core.forecast_lines import forecast_lines
from impq_core.machine import free_device_memory
from impq_core.model.device import devices_there, hardware, on_host, resolve_device, resolve_dtype
from impq_core.plugins import Plugins
from impq_core.runs.forecast import forecast_run
from impq_core.testing.device import MEMORY, NAME, Refused, StandIn, device_there

CPU = torch.device("cpu")
needs_no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


@needs_no_accelerator
def test_without_an_accelerator_the_processor_is_the_only_device() -> None:
    assert devices_there() == [CPU]
    for name in ("auto", "cpu", "cpu:0"):
        assert resolve_device(name) == CPU


def test_the_accelerator_is_the_device_by_default_and_has_its_index(device: StandIn) -> None:
    assert devices_there() == [CPU, device.device]
    for name in ("auto", NAME, f"{NAME}:0"):
        assert resolve_device(name) == device.device == torch.ones(1, device=name if name != "auto" else NAME).device
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(("name", "hint"), [("cdua", "'cuda'"), ("cpuu", "'cpu'"), ("othr", f"'{NAME}'"),
                                            ("cuda:", "cuda"), ("CUDA", "available"), ("", "available")])
def test_a_name_that_torch_does_not_know_is_refused_with_the_nearest(name: str, hint: str, device: StandIn) -> None:
    with pytest.raises(UsageError, match=hint) as refused:
        resolve_device(name)
    assert "\n" not in str(refused.value) and f"'{name}'" in str(refused.value)


@pytest.mark.parametrize("name", ["xpu:77", "meta", "vulkan", "cuda:99", f"{NAME}:1"])
def test_an_absent_device_is_refused_with_those_that_are_there(name: str, device: StandIn) -> None:
    with pytest.raises(ImpqError, match=rf"{name} .* cpu, {NAME}:0(, cuda:\d+)* or auto$"):
        resolve_device(name)


def test_the_configuration_takes_names_without_asking_torch() -> None:
    for name in ("auto", "cpu", "cuda", "cuda:1", "mps", "xpu", "npu:12"):
        assert RunConfig(device=name).device == name
    for name in ("", "GPU 0", "cuda:", "cuda:x", "cuda:1:2", "0", "cuda\n"):
        with pytest.raises(UsageError, match="device"):
            RunConfig(device=name)


def test_names_of_dtypes(device: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("float32", "bfloat16", "float16"):
        for where in (CPU, device.device):
            assert str(resolve_dtype(name, where)) == f"torch.{name}"
    for able, expected in (({}, torch.float32), ({"amx_tile": True}, torch.bfloat16),
                           ({"avx512_bf16": True, "cpu_name": "Intel"}, torch.float32),
                           ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: able)
        assert resolve_dtype("auto", CPU) == expected
        assert resolve_dtype("auto", device.device) == torch.bfloat16, "it is tried, if the device does not say"
    for has, expected in ((True, torch.bfloat16), (False, torch.float16)):
        module = torch.get_device_module(NAME)
        monkeypatch.setattr(module, "is_bf16_supported", lambda including_emulation, has=has: has, raising=False)
        assert resolve_dtype("auto", device.device) == expected


def test_numbers_are_float64_on_the_host(device: StandIn) -> None:
    values = torch.arange(3, dtype=torch.bfloat16, device=NAME).requires_grad_()
    array = on_host(values)
    assert array.dtype == np.float64 and array.tolist() == [0.0, 1.0, 2.0]
    assert device.reads == 1 and device.moved_out == 6, "converted behind the copy"


def test_hardware_and_free_memory(device: StandIn) -> None:
    assert hardware(CPU) == "cpu" and hardware(device.device) == f"{NAME} a stand-in in host memory"
    kept = torch.zeros(1000, device=NAME)
    assert free_device_memory(device.device) == MEMORY - kept.nbytes
    assert (free_device_memory(CPU) or 0) > 0


@needs_no_accelerator
def test_doctor_and_dry_run_show_the_device(tiny_config: RunConfig) -> None:
    def shown(config: RunConfig) -> tuple[str, str]:
        findings = examine("none", Path(config.output), Plugins())
        [line] = [finding.what for finding in findings if finding.what.startswith("devices: ")]
        return line, forecast_lines(forecast_run(config))[0]

    line, first = shown(tiny_config)
    assert line.startswith("devices: cpu;") and first.endswith("float32 on cpu")
    with device_there():
        line, first = shown(tiny_config)
        assert f"{NAME}:0 ({NAME} a stand-in" in line and f"on {NAME}:0 ({NAME} a stand-in" in first
        assert "on cpu" in shown(replace(tiny_config, device="cpu"))[1]
        device = ForecastDocument.of(forecast_run(tiny_config)).device
        assert device == DeviceDocument(f"{NAME}:0", f"{NAME} a stand-in in host memory", MEMORY)


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sum": lambda here, host: here + host,
    "product": lambda here, host: here @ host,
    "the other way round": lambda here, host: host.mul(here),
    "in place": lambda here, host: here.add_(host),
    "into the host": lambda here, host: host.add_(here),
    "list": lambda here, host: torch.cat([host, here]),
    "index of the device": lambda here, host: host[here.long()],
    "condition": lambda here, host: torch.where(host > 0, here, here),
    "scalar of the device": lambda here, host: host * here.sum(),
    "linear": lambda here, host: nn.functional.linear(host, here),
    "inference": lambda here, host: torch.inference_mode()(lambda: nn.functional.linear(here, host))(),
    "comparison": lambda here, host: torch.equal(here, host),
}


@pytest.mark.parametrize("name", MIXED)
def test_operators_over_two_devices_are_refused(name: str, device: StandIn) -> None:
    here, host = torch.eye(4).to(NAME), torch.eye(4)
    with pytest.raises(Refused, match="two devices"):
        MIXED[name](here, host)


def test_what_accelerators_permit_is_permitted(device: StandIn) -> None:
    here, host = torch.eye(4, device=NAME), torch.eye(4)
    assert (here * torch.tensor(2.0)).device == here[torch.tensor([0, 2])].device == device.device
    here.copy_(2 * host)
    assert torch.equal(here.cpu(), 2 * host)
    host.copy_(here)
    assert float(host.sum()) == float(here.sum()) == 8.0 and here.tolist() == host.tolist()
    assert here.unsqueeze_(0).shape == (1, 4, 4) and here.shape == (1, 4, 4)
    for made in (torch.tensor([1.0], device=NAME), torch.zeros(2, device=NAME), torch.ones_like(host, device=NAME)):
        assert made.device == device.device


def test_numpy_float64_and_generators_of_the_host_are_refused(device: StandIn) -> None:
    here = torch.ones(3, device=NAME)
    for read in (here.numpy, lambda: np.asarray(here), lambda: np.array([here, here])):
        with pytest.raises(Refused, match="numpy"):
            read()
    for widen in (here.double, lambda: torch.ones(3, dtype=torch.float64).to(NAME),
                  lambda: torch.zeros(1, dtype=torch.float64, device=NAME)):
        with pytest.raises(Refused, match="float64"):
            widen()
    with pytest.raises(Refused, match="generator"):
        torch.randn(3, device=NAME, generator=torch.Generator())


def test_float64_is_an_option() -> None:
    with device_there(float64=True):
        assert torch.ones(3, device=NAME).double().dtype == torch.float64


def test_modules_move_there_and_back_with_their_ties(device: StandIn) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    before, weight = model["a"].weight.detach().clone(), model["a"].weight
    for where in (NAME, "cpu"):
        model.to(where)
        assert model["a"].weight is model["b"].weight is weight and weight.device.type == where
        assert isinstance(weight, nn.Parameter) and torch.equal(weight.detach().cpu(), before)
    assert device.held == 0


def test_data_may_be_put_on_the_device_and_taken_off_by_permission_only(device: StandIn) -> None:
    linear = nn.Linear(3, 3)
    host, weight = linear.weight.data, linear.weight
    linear.weight.data = host.to(NAME)
    assert linear.weight is weight and weight.device == device.device
    weight.data = (2 * host).to(NAME)
    weight.data.add_(1)
    assert torch.equal(weight.detach().cpu(), 2 * host + 1)
    with pytest.raises(Refused, match="data"):
        weight.data = host


def test_data_may_be_taken_off_by_permission() -> None:
    with device_there(evicts=True) as device:
        linear = nn.Linear(3, 3)
        host = linear.weight.data
        linear.weight.data = host.to(NAME)
        linear.weight.data = host
        assert linear.weight.device == CPU and device.held == 0


def test_gradients_are_those_of_the_processor(device: StandIn) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)), torch.randn(5, 8)
    gradients = []
    for where in ("cpu", NAME):
        moved = model.to(where)
        moved.zero_grad()
        nn.functional.cross_entropy(moved(inputs.to(where)), torch.arange(5).to(where) % 4).backward()
        gradients.append([parameter.grad.cpu().clone() for parameter in moved.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@needs_no_accelerator
def test_a_late_import_is_named_as_what_is_wrong_with_gradients() -> None:
    code = ("import torch; torch.ones(1, requires_grad=True).backward()\n"
            "from impq_core.testing.device import device_there\n"
            "with device_there() as device:\n"
            "    assert torch.ones(2, device=device.name).sum().item() == 2\n"
            "    torch.ones(1, device=device.name, requires_grad=True).backward()\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "import impq_core.testing.device before" in done.stderr.splitlines()[-1]


def test_bytes_are_counted(device: StandIn) -> None:
    host = torch.zeros(100, 10)
    here = host.to(NAME)
    view, twice = here.T[2:], torch.cat([here, here])
    assert device.moved_in == 4000 and device.held == device.peak == 12000, "a view takes nothing"
    assert view.data_ptr() == here[:, 2:].data_ptr()
    del here, twice
    assert device.held == 4000 and device.peak == 12000, "the view needs its base"
    del view
    gc.collect()
    assert device.held == 0 and device.reads == 0
    assert torch.ones(5, device=NAME).sum().item() == 5.0
    assert device.reads == 1 and device.moved_out == 4
    device.forget()
    assert device.peak == device.moved_in == device.reads == 0


def test_the_device_leaves_nothing_behind() -> None:
    with device_there():
        kept = torch.ones(2, device=NAME)
        with pytest.raises(RuntimeError, match="already"), device_there():
            pass
    with pytest.raises(Refused, match="not there"):
        kept + 1
    with pytest.raises(ImpqError, match=NAME):
        resolve_device(NAME)
    with device_there() as again:
        assert again.held == 0 and again.device in devices_there()
    assert torch.device(NAME) not in devices_there()
