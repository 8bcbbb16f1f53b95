"""The losses of other libraries that the tests compare with.

Importing lightly or open_clip as a whole needs torchvision; their loss modules need torch alone. So the packages
around those modules are replaced by empty ones while the modules load from the installed distributions' files.
"""

import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

from info_nce import InfoNCE, info_nce
from pytorch_metric_learning.losses import NTXentLoss as MetricNTXentLoss
from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss
from torch import nn

__all__ = [
    "InfoNCE",
    "LightlyNTXentLoss",
    "MetricNTXentLoss",
    "OpenClipLoss",
    "SelfSupervisedLoss",
    "SupConLoss",
    "info_nce",
]


def _load(distribution: str, module: str, packages: dict[str, tuple[str, ...]]) -> ModuleType:
    """Imports `module` without running the ``__init__`` of its `packages`.

    Each package maps to those of its attributes that the module imports but never uses outside distributed runs.
    """
    root = Path(str(importlib.metadata.distribution(distribution).locate_file("")))
    top = module.split(".")[0]

    def loaded() -> dict[str, ModuleType]:
        return {name: value for name, value in sys.modules.items() if name.split(".")[0] == top}

    before = loaded()
    for name in before:
        del sys.modules[name]
    try:
        for package, unused in packages.items():
            shell = ModuleType(package)
            shell.__path__ = [str(root.joinpath(*package.split(".")))]
            for attribute in unused:
                setattr(shell, attribute, ModuleType(f"{package}.{attribute}"))
            sys.modules[package] = shell
        return importlib.import_module(module)
    finally:
        # The shells must not be what a later import of the real package finds.
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


OpenClipLoss: type[nn.Module] = _load("open_clip_torch", "open_clip.loss", {"open_clip": ()}).ClipLoss
LightlyNTXentLoss: type[nn.Module] = _load(
    "lightly",
    "lightly.loss.ntx_ent_loss",
    {
        "lightly": (),
        "lightly.loss": (),
        "lightly.models": ("utils",),
        "lightly.models.modules": (),
        "lightly.utils": (),
    },
).NTXentLoss
