"""Self-configuring medical image segmentation: nnU-Net v2 with diffusion pretraining and body coordinates.

Importing this package is cheap: torch and nnU-Net are imported only by the modules that use them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffseg_nnunet")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"
