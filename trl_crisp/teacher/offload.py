"""Keeps the weights of a frozen model on the host, and brings copies of them to the device for its pass."""

from collections.abc import Container

import torch
from torch import nn


class HostWeights:
    """
    The weights of a frozen model, on the host from now on.

    On CUDA the host's memory is pinned, and the copies run on a stream of their own, so that they overlap with other work. On a CPU the
    weights are on the host already, and nothing is copied.

    Args:
        model: A frozen model on its device. Its modules hold the parameters on the host, or between [`fetch`] and [`release`] the
            copies on the device.
        kept: Parameters that stay on the device.
    """

    def __init__(self, model: nn.Module, kept: Container[nn.Parameter] = ()) -> None:
        owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in kept:
                    # A tied parameter has several modules
                    owners.setdefault(parameter, []).append((module, name))
        self._owners = list(owners.values())
        self._devices = [parameter.device for parameter in owners]
        self._streams = {device: torch.cuda.Stream(device) for device in set(self._devices) if device.type == "cuda"}
        self._on_host = [
            parameter if parameter.device.type == "cpu" else _host_copy(parameter) for parameter in owners
        ]
        self._is_fetched = True
        self.release()

    def fetch(self) -> None:
        """Start to copy the weights to their devices. [`wait`] has to come before their use."""
        if self._is_fetched:
            return
        copies = [
            host if device == host.device else _frozen(torch.empty_like(host, device=device))
            for host, device in zip(self._on_host, self._devices, strict=True)
        ]
        for device, stream in self._streams.items():
            # The copies' memory belongs to the current stream, whose other tensors use it before and afterwards
            stream.wait_stream(torch.cuda.current_stream(device))
        for host, copy in zip(self._on_host, copies, strict=True):
            if copy is not host:
                with torch.cuda.stream(self._streams.get(copy.device)):
                    copy.copy_(host, non_blocking=True)
        self._put(copies)
        self._is_fetched = True

    def wait(self) -> None:
        """Let the work that comes next on the devices wait for the copies."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def release(self) -> None:
        """Free the copies on the devices."""
        if not self._is_fetched:
            return
        for stream in self._streams.values():
            # The host waits, because it may write into its weights next
            stream.synchronize()
        self._put(self._on_host)
        self._is_fetched = False

    def _put(self, parameters: list[nn.Parameter]) -> None:
        for parameter, owners in zip(parameters, self._owners, strict=True):
            for module, name in owners:
                module._parameters[name] = parameter


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    copy = parameter.detach().cpu()
    return _frozen(copy.pin_memory() if parameter.device.type == "cuda" else copy)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
