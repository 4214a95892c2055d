"""Metrics of quality and speed: paired errors, distances between sets of images, and latency."""

from ptq4dit_ao.metrics.distribution import Gaussian, frechet_distance, inception_score, precision_recall
from ptq4dit_ao.metrics.features import FeatureNetwork, Features, extract
from ptq4dit_ao.metrics.images import ImageErrors, image_errors, ssim
from ptq4dit_ao.metrics.intervals import Estimate, bootstrap
from ptq4dit_ao.metrics.latency import LatencyResult, measure_latency
from ptq4dit_ao.metrics.layers import LeaveOneOut, layer_errors, leave_one_out, weight_errors
from ptq4dit_ao.metrics.paired import PairedError, paired_error
from ptq4dit_ao.metrics.perceptual import clip_score, lpips
from ptq4dit_ao.metrics.statistics import Distances, ReferenceStatistics

__all__ = [
    "Distances",
    "Estimate",
    "FeatureNetwork",
    "Features",
    "Gaussian",
    "ImageErrors",
    "LatencyResult",
    "LeaveOneOut",
    "PairedError",
    "ReferenceStatistics",
    "bootstrap",
    "clip_score",
    "extract",
    "frechet_distance",
    "image_errors",
    "inception_score",
    "layer_errors",
    "leave_one_out",
    "lpips",
    "measure_latency",
    "paired_error",
    "precision_recall",
    "ssim",
    "weight_errors",
]
