"""The version of qsim-core, and of the plugin API."""

__version__ = "0.1.0"
