"""Spares a process the parts of torch, transformers and scipy that it never uses.

Half of the time in which a trial host or a server starts goes into importing code: torch's
compiler, transformers' training over several GPUs, and scipy's optimizers, which transformers wants
for one loss of object detection and hivemind for averaging weights.
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_loading = threading.RLock()


def import_less() -> None:
    """To be called first in a process that only runs models, and that belongs to us.

    Nothing here is lost: torch's compiler and scipy's optimizers are imported when something uses
    them. But functions that were marked for the compiler before that are no longer known to it, and
    transformers behaves as on a build of torch without `torch.distributed`. So a user's own process
    must be left alone. Does nothing about what is already imported.
    """
    import scipy  # noqa: F401 (the parents of what is deferred)
    import torch  # noqa: F401

    if optimize := _defer("scipy.optimize", "_lsap"):
        optimize.linear_sum_assignment = optimize._lsap.linear_sum_assignment
    if compiler := _defer("torch._dynamo", "_trace_wrapped_higher_order_op"):
        # What torch's optimizers and transformers call without compiling anything. All of it only
        # tells the compiler how to treat a function or tensor.
        compiler.allow_in_graph = compiler.assume_constant_result = _as_it_is
        compiler.disable = _not_compiled
        compiler.graph_break = compiler.mark_static_address = _nothing
    sys.meta_path.insert(0, _PackagesFirst())
    if "transformers.core_model_loading" not in sys.modules:
        for name in ("transformers.utils", "transformers.utils.import_utils"):
            vars(import_module(name))["is_torch_distributed_available"] = _no


class _Deferred(ModuleType):
    """A package that is executed when a name is asked for that it does not have yet."""

    __spec__: ModuleSpec

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by those who look through all modules
            raise AttributeError(name)
        self._execute()
        return getattr(self, name)

    def _execute(self) -> None:
        with _loading:
            if type(self) is _Deferred:
                self.__class__ = ModuleType  # type: ignore[assignment]
                assert self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)


class _PackagesFirst(MetaPathFinder):
    """Executes a deferred package before a module in it is imported, as Python would."""

    def find_spec(self, name: str, *_args: Any) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if type(package) is not _Deferred:
            return None
        package._execute()
        return ModuleSpec(name, _Imported(sys.modules[name])) if name in sys.modules else None


class _Imported(Loader):
    """Gives a module that the execution of its package has imported."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _defer(name: str, needed: str) -> Any:
    """Defers the import of the package `name`, but for its module `needed`, and returns it.

    None if it is imported already.
    """
    if name in sys.modules:
        return None
    spec = find_spec(name)
    assert spec is not None
    package = sys.modules[name] = module_from_spec(spec)
    import_module(f"{name}.{needed}")
    package.__class__ = _Deferred
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, package)
    return package


def _as_it_is(function: Any) -> Any:
    return function


def _not_compiled(function: Any = None, *_args: Any, **_kwargs: Any) -> Any:
    return _as_it_is if function is None else function


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


def _no() -> bool:
    return False
