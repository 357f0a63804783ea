"""Do something as soon as a module has been imported, whoever imports it, without importing it."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


def once_imported(module: str, action: Callable[[], object]) -> None:
    """Call `action` behind the import of the module: now, where that has happened already."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(module, action))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds one module, once, the way that Python would, and looks at it after its code has run."""

    def __init__(self, module: str, action: Callable[[], object]):
        self.module, self.action = module, action

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self.action)
        return spec


class _Telling(importlib.abc.Loader):
    """A module's loader, with something to do behind it."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], object]):
        self.loader, self.action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # what others look at is the module's own
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()
