"""Gaussian diffusion of images, Bernoulli diffusion of masks, time conditioning, and folding. Knows no nnU-Net."""
