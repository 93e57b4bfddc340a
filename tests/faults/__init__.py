"""Fault injection: ``python -m tests.faults`` (see ``__main__.py``)."""
