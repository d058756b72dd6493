"""The training scripts as modules. They find one another by plain names, as scripts do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="session")
def training() -> SimpleNamespace:
    """Every module of training/ by its name.

    Their names are set aside again afterwards: tests/ has a `pictures` of its own.
    """
    names = [path.stem for path in TRAINING.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(TRAINING))
    try:
        modules = {name: importlib.import_module(name) for name in names}
        for name in names:
            del sys.modules[name]
    finally:
        sys.path.remove(str(TRAINING))
        sys.modules.update(others)
    return SimpleNamespace(**modules)
