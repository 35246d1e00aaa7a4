"""Sliding-window prediction and export of whole cases through nnU-Net's predictor."""
