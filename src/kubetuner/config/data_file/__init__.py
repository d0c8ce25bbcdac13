"""``multidatabackend.json``: its entries, their keys, and the checks between them."""
