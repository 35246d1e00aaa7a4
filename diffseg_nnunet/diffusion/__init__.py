"""Gaussian diffusion of images, time conditioning, and folding. Knows no nnU-Net."""
