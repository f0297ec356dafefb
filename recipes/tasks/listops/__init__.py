"""ListOps: nested MIN, MAX, MED and SM of digits."""
