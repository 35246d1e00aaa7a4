"""nnU-Net planners that plan both stages: residual-encoder U-Net (the default) and plain U-Net."""

from .fingerprint import DiffSegFingerprintExtractor
from .planner import DiffSegPlainPlanner, DiffSegPlanner, PlanOptions

__all__ = ["DiffSegFingerprintExtractor", "DiffSegPlainPlanner", "DiffSegPlanner", "PlanOptions"]
