"""Strategies that decide which plan is worth a measurement: each a class with `ask` and `tell`, see `problem`."""
