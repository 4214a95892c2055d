"""Calibration samples: inputs that a denoiser receives while its pipeline runs."""

from ptq4dit_ao.calibration.pipeline import collect_components, collect_from_pipeline
from ptq4dit_ao.calibration.samples import CalibrationSamples
from ptq4dit_ao.calibration.sampling import Sampling, SamplingPipeline, as_denoiser, as_function, sample
from ptq4dit_ao.calibration.schedule import check_timesteps
from ptq4dit_ao.calibration.timesteps import NormalTimesteps, choose_timesteps

__all__ = [
    "CalibrationSamples",
    "NormalTimesteps",
    "Sampling",
    "SamplingPipeline",
    "as_denoiser",
    "as_function",
    "check_timesteps",
    "choose_timesteps",
    "collect_components",
    "collect_from_pipeline",
    "sample",
]
