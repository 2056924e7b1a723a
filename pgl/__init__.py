"""Parameter Golf as a PyTorch Lightning application: the library."""

__version__ = "0.1.0"
