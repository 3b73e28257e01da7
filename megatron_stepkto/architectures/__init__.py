"""Declarations of model architectures: names, shapes, sharding, FLOPs. No weights are read here."""
