"""The executable companion to TraceAlign: trace, score and stop reactivated training spans."""

__version__ = "0.1.0"
