"""One decoder a file. A module that defines a subclass of `Strategy` with a name is found by the registry."""
