"""Worked examples. The product imports nothing from here."""
