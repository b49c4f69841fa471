"""fairlead_zoo: tiny models and worlds."""

__version__ = "0.1.0"
