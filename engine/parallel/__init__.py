"""One model over several processes, each with a device of its own (tensor parallelism)."""
