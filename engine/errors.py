"""The engine's error hierarchy; the server maps each class to one HTTP status."""

from __future__ import annotations


class LinocutError(Exception):
    """Base of everything Linocut raises on purpose."""


class ParameterError(LinocutError):
    """A request parameter is invalid. `param` is its dotted name, as the client wrote it."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ConfigError(LinocutError):
    """The server's configuration is invalid or does not fit the machine."""


class ModelError(LinocutError):
    """A checkpoint cannot be found, read or served."""


class EngineDead(LinocutError):
    """The engine process is gone; nothing more can be served."""


class EngineStopped(EngineDead):
    """The engine was stopped by the server, which is shutting down."""
