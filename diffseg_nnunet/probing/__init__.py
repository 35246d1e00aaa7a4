"""Probing: small heads on the frozen features of a pretrained network, which say how much the features know."""
