"""The one exception family of kvfx: every refusal says what, where, and what to do."""


class KvfxError(Exception):
    """Base of every error that kvfx raises on purpose."""


class ModelNotFound(KvfxError, ValueError):
    """A model's name or path does not lead to a model that can be loaded."""


class CaptureError(KvfxError):
    """The model cannot be captured as one stateless decoder graph."""


class UnmatchedAttention(KvfxError):
    """An attention computation was found but not understood."""


class VerificationError(KvfxError):
    """A graph breaks the rules of its level, or computes something else than its model."""


class UnsupportedShape(KvfxError):
    """A policy, format or backend cannot work with the shapes of a site."""


class CapacityExceeded(KvfxError):
    """A cache would have to hold more entries than it was allowed to."""


class CalibrationError(KvfxError):
    """A calibration does not fit the model it is used with."""


class StoreError(KvfxError):
    """A store of segments cannot be used, or a segment is not one that it may hold."""


class PolicyError(KvfxError, ValueError):
    """A policy is unknown, has a knob out of range, or does not compose."""


class InputError(KvfxError, ValueError):
    """The inputs of a call do not describe left-padded, consecutive token rows."""


class UnsupportedOperation(KvfxError, NotImplementedError):
    """The compressed cache cannot do what was asked of it."""
