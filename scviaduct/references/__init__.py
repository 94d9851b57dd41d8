"""Pretrained models as verified packages."""
