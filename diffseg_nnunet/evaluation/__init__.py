"""DSC, NSD and HD95 per case and structure, and statistics over cases. Knows no nnU-Net."""
