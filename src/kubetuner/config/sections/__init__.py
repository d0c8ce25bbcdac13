"""What each step receives: frozen, strict, and canonical as JSON."""
