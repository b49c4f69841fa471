"""fairlead_watermark: mark, detect, audit, repair."""

__version__ = "0.1.0"
