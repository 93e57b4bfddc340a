"""Files from others: errors name the file. A ``pickle_module`` in which nothing is run."""

import codecs
import contextlib
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from os import PathLike
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from utils.errors import UserError, printable


def reason(error: Exception) -> str:
    """Why something failed, in the system's own words."""
    return (getattr(error, "strerror", None) or "").lower() or printable(str(error))[:300]


@contextlib.contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line that names the file."""
    try:
        yield
    except Exception as error:  # the libraries promise no kind of error for a damaged file
        text = reason(error)
        if not isinstance(error, OSError | ValueError | EOFError | ImportError | UserError):
            text = f"damaged or truncated ({type(error).__name__} {text})"
        raise UserError(f"{path}: {text}") from None


_PARTS = (
    *(set, codecs.encode, OrderedDict, torch.Size, torch.device, np.dtype),
    *(torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter),
)
_ALLOWED: dict[str, Any] = {f"{part.__module__}.{part.__name__}": part for part in _PARTS}
_ALLOWED |= {str(part): part for part in vars(torch).values() if isinstance(part, torch.dtype)}
_ALLOWED |= {  # those of NumPy could be told to take any bytes for pointers to objects
    "numpy.ndarray": None,
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0),
    "numpy._core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype.str)[0],
    "numpy._core.numeric._frombuffer": lambda data, dtype, shape, order: np.frombuffer(
        data, dtype.str
    ).reshape(shape, order=order),
    "argparse.Namespace": SimpleNamespace,  # a class that no file can change
}


class Unpickler(pickle._Unpickler):  # in Python: the one in C reserves what a damaged file claims
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        if (key := f"{module}.{name}") not in _ALLOWED:
            raise UserError(f"wants to run or build {key}, which data may not; not run")
        return _ALLOWED[key]


def load(file: Any, **options: Any) -> Any:
    """The next pickle in a binary file; ``options`` are those of ``pickle.load``."""
    return Unpickler(file, **options).load()
