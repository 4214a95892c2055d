"""Feature networks by name: a shipped classifier, or whatever a user has."""

from __future__ import annotations

import importlib

from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation import FeatureNetwork, Features
from ptq4dit_ao.reference import REFERENCES, Reference, load_reference_classifier


def load_features(spec: str) -> FeatureNetwork:
    """Load a feature network.

    Args:
        spec: ``digits`` or ``fashion`` for the classifier that judges that shipped DiT; or
            ``package.module:function``, a function without arguments that returns a
            :class:`~ptq4dit_ao.evaluation.FeatureNetwork`.

    Raises:
        ArgumentError: it is neither.
    """
    if spec in REFERENCES:
        return classifier_features(REFERENCES[spec])
    module, colon, function = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in module.split(".")) and function.isidentifier()):
        raise ArgumentError(
            f"feature network {spec!r} is none of {', '.join(map(repr, REFERENCES))}, 'package.module:function'; check "
            "its spelling"
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


def classifier_features(reference: Reference) -> FeatureNetwork:
    """The classifier that judges a shipped DiT: 64 features, the mean over positions of its last feature map."""
    classifier, shape = load_reference_classifier(reference.name), (1, reference.size, reference.size)

    def read(images: Tensor) -> Features:
        if images.shape[1:] != shape:
            expected, got = (" x ".join(map(str, found)) for found in (shape, images.shape[1:]))
            raise ArgumentError(
                f"the {reference.name} classifier reads images of {expected}, got {got}; give another feature network "
                "(--features)"
            )
        spatial = classifier.features(images)
        probabilities = classifier.head(spatial.flatten(1)).softmax(1)
        return Features(pooled=spatial.mean((2, 3)), spatial=spatial, probabilities=probabilities)

    return FeatureNetwork(name=f"{reference.name} classifier", read=read)
