"""The place where concrete things meet: settings, the command line, and one wiring module per process."""

__version__ = "0.1.0"
