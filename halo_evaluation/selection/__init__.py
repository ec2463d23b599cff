"""Selects the layers that keep softmax attention: the layer sweep and the rankings of its scores."""
