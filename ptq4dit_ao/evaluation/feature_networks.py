"""Feature networks by name: those of the shipped classifiers, or a user's own."""

from __future__ import annotations

from torch import Tensor

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.metrics import FeatureNetwork, Features
from ptq4dit_ao.reference import REFERENCES, Reference, load_reference_classifier
from ptq4dit_ao.workflow.by_name import call_by_name


def load_features(spec: str) -> FeatureNetwork:
    """Load a feature network.

    Args:
        spec: ``digits``, ``fashion`` or ``flow`` for the classifier that judges that shipped model; or
            ``package.module:function``, a function without arguments that returns a
            :class:`~ptq4dit_ao.metrics.FeatureNetwork`.

    Raises:
        ArgumentError: it is neither.
    """
    if spec in REFERENCES:
        return classifier_features(REFERENCES[spec])
    network = call_by_name("feature network", spec, map(repr, REFERENCES))
    if not isinstance(network, FeatureNetwork):
        raise ArgumentError(f"{spec} returned a {type(network).__name__}; expected a ptq4dit_ao.metrics.FeatureNetwork")
    return network


def classifier_features(reference: Reference) -> FeatureNetwork:
    """Feature network of a shipped DiT's classifier: 64 features, the mean over positions of its last feature map."""
    classifier, shape = load_reference_classifier(reference.name), (1, reference.size, reference.size)

    def read(images: Tensor) -> Features:
        if images.shape[1:] != shape:
            expected, got = (" x ".join(map(str, found)) for found in (shape, images.shape[1:]))
            raise ArgumentError(
                f"the {reference.judge} classifier reads images of {expected}, got {got}; give another feature network "
                "(features=...)"
            )
        spatial = classifier.features(images)
        probabilities = classifier.head(spatial.flatten(1)).softmax(1)
        return Features(pooled=spatial.mean((2, 3)), spatial=spatial, probabilities=probabilities)

    return FeatureNetwork(name=f"{reference.judge} classifier", read=read)
