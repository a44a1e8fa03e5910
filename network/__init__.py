"""Recursive cascaded networks (Zhao, Dong, Chang, Xu, ICCV 2019) on TensorFlow 2 / Keras 3.

>>> from network import load_model
>>> model = load_model("weights/VTN-10-liver")      # published or own
>>> out = model((fixed, moving))                    # [B, X, Y, Z, 1] in 0..1
>>> out.flow, out.warped                            # composed flow [B, X, Y, Z, 3], warped moving image

The names below are imported on first use, so that reading a configuration does not start TensorFlow.
"""

import importlib
import os
import sys
from typing import Any

from errors import UserError

_KERAS = sys.modules.get("keras")  # imported before this package, perhaps
_BACKEND = _KERAS.config.backend() if _KERAS is not None else os.environ.get("KERAS_BACKEND") or "tensorflow"
if _BACKEND != "tensorflow":
    raise UserError(f"KERAS_BACKEND is {_BACKEND!r}, but the networks need Keras on TensorFlow; unset it")
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever ~/.keras/keras.json says
# TensorFlow leaves oneDNN off on processors without AVX-512; there too it makes a training step several times faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

_HOMES = {
    "CascadeConfig": "network.config",
    "CascadeOutput": "network.recursive_cascaded_networks",
    "RecursiveCascadedNetwork": "network.recursive_cascaded_networks",
    "load_model": "network.checkpoints",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'network' has no attribute {name!r}; it offers {', '.join(__all__)}")
