"""As much of vLLM as a model loader meets: its registry, base class, plugins and values, doing what vLLM 0.12 to 0.32 does.

vLLM itself is too large to be a test's dependency. What the real one does, and where that stands: see `modelp2p.loader.vllm`.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest
import torch

from modelp2p.loader.vllm import register

_log = logging.getLogger("vllm")


@dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: Any = field(default_factory=dict)
    device: str | None = None
    ignore_patterns: list[str] | str = field(default_factory=lambda: ["original/**/*"])


@dataclass
class ModelConfig:
    model: str
    architecture: Callable[[], torch.nn.Module]
    """In the real one a configuration names it."""
    revision: str | None = None
    quantization: str | None = None
    dtype: torch.dtype = torch.float32


@dataclass
class VllmConfig:
    model_config: ModelConfig
    load_config: LoadConfig
    device: str = "cpu"


class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None: ...

    @abstractmethod
    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None: ...

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig) -> torch.nn.Module:
        device = torch.device(self.load_config.device or vllm_config.device)
        with default_dtype(model_config.dtype):
            with device:
                model = model_config.architecture()
            self.load_weights(model, model_config)
            for module in model.modules():
                if method := getattr(module, "quant_method", None):
                    method.process_weights_after_loading(module)
        return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Vllm:
    """One process's vLLM. Put in place by the fixture `vllm`."""

    def __init__(self) -> None:
        self.loaders: dict[str, type[BaseModelLoader]] = {}
        self.overwritten: list[str] = []
        self._has_plugins = False

    def register_model_loader(self, load_format: str) -> Callable[[type[BaseModelLoader]], type[BaseModelLoader]]:
        def wrapper(loader: type[BaseModelLoader]) -> type[BaseModelLoader]:
            if load_format in self.loaders:
                self.overwritten.append(load_format)
            if not issubclass(loader, BaseModelLoader):
                raise ValueError("The model loader must be a subclass of `BaseModelLoader`.")
            self.loaders[load_format] = loader
            return loader

        return wrapper

    def load_general_plugins(self) -> None:
        if self._has_plugins:
            return
        self._has_plugins = True
        functions = []
        for plugin in entry_points(group="vllm.general_plugins"):
            try:
                functions.append(plugin.load())
            except Exception:
                _log.exception("Failed to load plugin %s", plugin.name)
        for function in functions:
            function()

    def get_model_loader(self, load_config: LoadConfig) -> BaseModelLoader:
        if load_config.load_format not in self.loaders:
            raise ValueError(f"Load format `{load_config.load_format}` is not supported")
        return self.loaders[load_config.load_format](load_config)

    def get_model(self, vllm_config: VllmConfig) -> torch.nn.Module:
        """What each worker does at its start."""
        self.load_general_plugins()
        loader = self.get_model_loader(vllm_config.load_config)
        return loader.load_model(vllm_config, vllm_config.model_config)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    """A process in which vLLM can be imported and has not loaded its plugins yet."""
    stub = Vllm()
    registry = ModuleType("vllm.model_executor.model_loader")
    registry.register_model_loader = stub.register_model_loader  # type: ignore[attr-defined]
    base = ModuleType("vllm.model_executor.model_loader.base_loader")
    base.BaseModelLoader = BaseModelLoader  # type: ignore[attr-defined]
    for module in (ModuleType("vllm"), ModuleType("vllm.model_executor"), registry, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register.cache_clear()
    yield stub
    register.cache_clear()


Weights = Iterable[tuple[str, torch.Tensor]]


class ColumnParallel(torch.nn.Module):
    """A rank's rows of a matrix; it narrows what it is given whole, as vLLM's layers do."""

    def __init__(self, rows: int, columns: int, rank: int, ranks: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((rows // ranks, columns), float("nan")), requires_grad=False)
        self._start = rank * (rows // ranks)

    def weight_loader(self, parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
        parameter.data.copy_(loaded.narrow(0, self._start, parameter.shape[0]))


class Served(torch.nn.Module):
    """A model as vLLM has them: `load_weights` takes the checkpoint's names and tells which parameters it filled."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.proj = ColumnParallel(64, 512, rank, ranks)
        self.norm = torch.nn.Parameter(torch.full((4096,), float("nan")), requires_grad=False)
        self.seen: list[str] = []

    def load_weights(self, weights: Weights) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            self.seen.append(name)
            if name == "proj.weight":
                self.proj.weight_loader(parameters[name], tensor)
            else:
                # Some models change what they are given.
                parameters[name].data.copy_(tensor.mul_(2))
            loaded.add(name)
        return loaded
