"""The report of one quantized model, as JSON holds it: what ``report.json`` and an artifact's manifest say."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from ptq4dit_ao.choices import BalanceMethod, Dynamic, FoldForm, SiteKind

Curve = list[tuple[float, float | None]]
"""``[timestep, dB]``; None for a value that is not finite."""


class ModelEntry(TypedDict):
    """The float model."""

    name: str
    parameters: int


class SettingsEntry(TypedDict):
    """Settings of the balancing."""

    method: BalanceMethod
    alpha: float | str | None
    max_scale: float
    fold_form: FoldForm


class SiteEntry(TypedDict):
    """One balance site; the vectors, which a manifest leaves out, are per variable or per timestep."""

    name: str
    layers: list[str]
    channels: int
    variables: int
    status: Literal["folded", "refused"]
    reason: str | None
    kind: SiteKind
    vector_multiplies: int
    couples_blocks: bool
    folded_into: list[str]
    num_clipped: int
    method: NotRequired[BalanceMethod]
    alpha: NotRequired[float | None]
    centred: NotRequired[bool]
    """Whether an offset is subtracted from the input; older files lack it."""
    scores: NotRequired[dict[str, float | None]]
    b_range: NotRequired[tuple[float | None, float | None]]
    b: NotRequired[list[float | None]]
    salience_x: NotRequired[list[float | None]]
    salience_w: NotRequired[list[float | None]]
    timesteps: NotRequired[list[float | None]]
    salience_t: NotRequired[list[float | None]]
    rho: NotRequired[list[float | None]]
    eta: NotRequired[list[float | None]]


class LayerEntry(TypedDict):
    """One linear."""

    name: str
    node: str
    status: Literal["integer", "float"]
    weight_bits: int | None
    activation_bits: int | None
    """16 for an input that stays float, with integer weights."""
    dynamic: NotRequired[Dynamic]
    """Whether each token of the input has a range of its own; missing in reports from before there was a choice."""
    activation_clipping: float | None
    """Range of the input, as a part of the range from minimum to maximum."""
    weight_clipping: float | None
    """Range of the weight, as a part of the one that holds the largest; mean over channels."""
    sqnr_db: float | None
    sqnr_db_t: NotRequired[Curve]


class AttentionEntry(TypedDict):
    """Quantized matrix products of attention."""

    matmuls: int
    bits: list[int]


class LeftOutEntry(TypedDict):
    """Gain of the model if one quantized input is put back to float."""

    name: str
    nodes: list[str]
    sqnr_db: float | None
    gain_db: float | None


class LeaveOneOutEntry(TypedDict, total=False):
    """Cost of each quantized input; or the reason why it was not measured (``skipped``)."""

    skipped: str | None
    sqnr_db: float | None
    rows: int
    inputs: list[LeftOutEntry]


class EvaluationEntry(TypedDict):
    """Error of the output of the simulated integer graph, against the float model's."""

    sqnr_db: float
    per_timestep: list[tuple[float, float]]
    samples: int
    seed: int
    on_calibration_samples: bool


class SizeEntry(TypedDict):
    """Bytes before and after: of the whole model, and of the layers that were quantized."""

    float32_bytes: int
    artifact_bytes: int
    """Graph and weights on disk; the manifest, which says this, is not counted."""
    ratio: float
    quantized_layers_float32_bytes: int
    quantized_layers_bytes: int
    quantized_layers_ratio: float
    bits_per_weight: NotRequired[float]
    """Bits on disk of a quantized weight's element, scales and steps included; older files lack it."""


class InputSizesEntry(TypedDict):
    """Sizes of the model's inputs: which may differ from call to call, and which may not."""

    free: list[str]
    """Each free size with its values in words."""
    conditions: list[str]
    fixed: dict[str, str]
    """Reasons by axis."""


class ChosenBitsEntry(TypedDict):
    """The bits that the weights of one quantized input were given."""

    name: str
    layers: list[str]
    parameters: int
    noise: list[float]
    bits: int


class WeightBitsEntry(TypedDict):
    """Decision of ``bits: auto``."""

    candidates: list[int]
    average_bits: float
    inputs: list[ChosenBitsEntry]


class ChosenInputEntry(TypedDict):
    """The decision on one quantized input."""

    name: str
    layers: list[str]
    share: float
    noise: list[float]
    """With a static range, and per token."""
    dynamic: bool


class DynamicEntry(TypedDict):
    """Decision of ``dynamic: auto``."""

    share: float
    inputs: list[ChosenInputEntry]


class Report(TypedDict):
    """Everything that is known of one quantized model."""

    title: str
    model: ModelEntry
    inputs: InputSizesEntry | None
    """None in models that were saved before sizes other than the batch could be free."""
    recipe: dict[str, Any]
    versions: dict[str, str]
    settings: SettingsEntry | None
    sites: list[SiteEntry]
    layers: list[LayerEntry]
    attention: AttentionEntry | None
    weight_bits: WeightBitsEntry | None
    dynamic: NotRequired[DynamicEntry | None]
    leave_one_out: LeaveOneOutEntry | None
    evaluation: EvaluationEntry | None
    size: SizeEntry | None
    seconds: dict[str, float]
    notes: list[str]
