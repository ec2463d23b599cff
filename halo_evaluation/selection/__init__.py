"""Which layers stay softmax attention: the layer sweep and the rankings that read its scores."""
