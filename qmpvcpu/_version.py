"""The one place that states the version; read by hatchling and by `qmpvcpu --version`."""

__version__ = "0.1.0"
