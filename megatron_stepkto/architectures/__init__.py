"""Model architectures as facts: names, shapes, sharding, FLOPs. No weights are read here."""
