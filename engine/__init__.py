"""The inference engine: scheduler, caches, decoding strategies, models."""
