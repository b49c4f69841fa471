"""fairlead_zoo: tiny models and worlds with controllable alignment, trained on a laptop."""

__version__ = "0.1.0"
