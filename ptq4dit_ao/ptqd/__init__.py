"""PTQD (He et al. 2023, arXiv 2305.10657): correction of a denoiser's quantization noise in its scheduler."""

from ptq4dit_ao.ptqd.fit import fit_noise_correction
from ptq4dit_ao.ptqd.scheduler import PTQDScheduler
from ptq4dit_ao.ptqd.table import NoiseCorrection

__all__ = ["NoiseCorrection", "PTQDScheduler", "fit_noise_correction"]
