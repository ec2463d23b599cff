"""Modelling code that travels inside exported folders; it runs without any package of this project."""
