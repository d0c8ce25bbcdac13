"""``config.json``: its keys, what each means, and the checks between them."""
