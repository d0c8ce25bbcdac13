"""Imported, never called here."""
