"""Universal body coordinates: positions of voxels in mm, the head, the label-free loss. Knows no nnU-Net."""
