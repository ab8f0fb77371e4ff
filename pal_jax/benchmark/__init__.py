"""All methods under one protocol (METHOD sections 5 to 7)."""
