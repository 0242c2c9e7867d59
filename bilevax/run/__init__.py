"""The driver: chunks of compiled steps, and what the host does between them."""
