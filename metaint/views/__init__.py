"""Scans made readable. Imported by nothing that measures."""
