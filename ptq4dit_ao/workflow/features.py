"""Feature networks by name: the shipped classifier, or whatever a user has."""

from __future__ import annotations

import importlib

from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation import FeatureNetwork, Features
from ptq4dit_ao.reference import load_reference_classifier

DIGITS = "digits"


def load_features(spec: str) -> FeatureNetwork:
    """Load a feature network.

    Args:
        spec: ``digits`` for the shipped classifier of digits; or ``package.module:function``, a function without
            arguments that returns a :class:`~ptq4dit_ao.evaluation.FeatureNetwork`.

    Raises:
        ArgumentError: it is neither.
    """
    if spec == DIGITS:
        return digits_features()
    module, colon, function = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in module.split(".")) and function.isidentifier()):
        raise ArgumentError(
            f"feature network {spec!r} is neither {DIGITS!r} nor 'package.module:function'; check its spelling"
        )
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, OSError) as error:
        raise ArgumentError(f"feature network {spec!r} cannot be loaded: {error}") from error
    if not isinstance(network, FeatureNetwork):
        raise ArgumentError(
            f"{spec} returned a {type(network).__name__}; expected a ptq4dit_ao.evaluation.FeatureNetwork"
        )
    return network


def digits_features() -> FeatureNetwork:
    """The classifier that judges the reference DiT: 64 features, the mean over positions of its last feature map."""
    classifier = load_reference_classifier()

    def read(images: Tensor) -> Features:
        if images.shape[1:] != (1, 8, 8):
            raise ArgumentError(
                f"the digits classifier reads images of 1 x 8 x 8, got {' x '.join(map(str, images.shape[1:]))}; give "
                "another feature network (--features)"
            )
        spatial = classifier.features(images)
        probabilities = classifier.head(spatial.flatten(1)).softmax(1)
        return Features(pooled=spatial.mean((2, 3)), spatial=spatial, probabilities=probabilities)

    return FeatureNetwork(name="digits classifier", read=read)
