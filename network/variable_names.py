"""The names of a network's variables in checkpoints."""

from typing import Any

import keras

_CONTAINERS = (list, tuple, dict)


def _attributes_of_keras() -> frozenset[str]:
    """Names of the attributes that Keras gives to every layer for its own use: no weights of a network are there."""
    probe = keras.layers.Layer()
    probe.part = keras.layers.Layer()
    return frozenset(vars(probe)) - {"part"}


_OWN = _attributes_of_keras()
# The original's names of a layer's variables.
_ORIGINAL = {"kernel": "W", "bias": "b"}


def variable_names(stem: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Every variable of a built network, trainable or not, under a name that is the same in every process.

    A name is the path of attributes to the variable, 'norm/moving_mean' or 'blocks/0/kernel': it follows from the code
    of the network, while Keras counts on in the names of layers that were not given one. Where the network has
    `published_names`, it is the layer's name and W or b, as in the published checkpoints: 'conv1/W'.

    Args:
        stem: a base network or the affine network.

    Returns:
        Dict name -> variable.

    Raises:
        ValueError: a variable is not reached by attributes, or two have one name.
    """
    found: dict[int, tuple[str, keras.Variable]] = {}
    _collect(stem, (), stem, found, set(), getattr(stem, "published_names", False))
    names: dict[str, keras.Variable] = {}
    for variable in stem.variables:
        if id(variable) not in found:
            raise ValueError(
                f"{type(stem).__name__}: the variable {variable.path} cannot be named, so it could not be saved; "
                "make its layer an attribute of the network, or an item of a list or dict that is one"
            )
        name, _ = found[id(variable)]
        if name in names:
            raise ValueError(
                f"{type(stem).__name__}: two variables have the name {name}; give their layers other names"
            )
        names[name] = variable
    return names


def _collect(
    value: Any,
    path: tuple[str, ...],
    layer: keras.layers.Layer,
    found: dict[int, tuple[str, keras.Variable]],
    visited: set[int],
    published: bool,
) -> None:
    """Add the variables below an attribute's value to `found`: id -> (name, variable)."""
    if isinstance(value, keras.Variable):
        name = "/".join(path)
        if published:
            name = f"{layer.name}/{_ORIGINAL.get(path[-1], path[-1])}"
        found.setdefault(id(value), (name, value))
        return
    if id(value) in visited:
        return
    if isinstance(value, keras.Model):
        children = {str(k): part for k, part in enumerate(value.layers)} | _attributes(value)
    elif isinstance(value, keras.layers.Layer | keras.random.SeedGenerator):
        children = _attributes(value)
    elif isinstance(value, _CONTAINERS):
        children = value if isinstance(value, dict) else {str(k): part for k, part in enumerate(value)}
    else:
        return
    visited.add(id(value))
    layer = value if isinstance(value, keras.layers.Layer) else layer
    for name, child in children.items():
        _collect(child, (*path, str(name).strip("_")), layer, found, visited, published)


def _attributes(value: object) -> dict[str, Any]:
    return {name: child for name, child in vars(value).items() if name not in _OWN}
