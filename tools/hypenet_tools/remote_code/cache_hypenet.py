# mypy: ignore-errors
"""HypeNet's cache: keys and values of attention layers, states of recurrent layers."""

from transformers.cache_utils import Cache


class HypeNetCache(Cache):
    """The model's memory of the tokens seen so far.

    Attention layers keep keys and values [b, G, n, D] in buffers with room to grow. Recurrent layers keep
    one fp32 state; its first axis is b, its size does not depend on n. `real` [b, n] is False at padding and
    None while there is no padding. A recurrent state cannot be rolled back, so `crop` and assisted generation
    are not supported.
    """

    is_compileable = False
    is_croppable = False
    is_initialized = True

    def __init__(self, config):
        super().__init__(layers=[])
        self.num_layers = config.num_hidden_layers
        self.reset()

    def reset(self):
        self.length = 0
        self.keys, self.values, self.states = {}, {}, {}
        self.real = None

    def __len__(self):
        return self.num_layers

    def __repr__(self):
        return f"HypeNetCache(length={self.length})"

    @property
    def batch_size(self):
        tensors = [*self.keys.values(), *self.states.values()]
        return tensors[0].shape[0] if tensors else -1

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_max_length(self, layer_idx=None):
        return -1

    def get_mask_sizes(self, query_length, layer_idx=0):
        return self.length + query_length, 0

    def update(self, key_states, value_states, layer_idx):
        """Append keys and values [b, G, t, D] of one layer; returns all of them [b, G, n + t, D]."""
        keys = self._append(self.keys, key_states, layer_idx)
        return keys, self._append(self.values, value_states, layer_idx)

    def _append(self, buffers, new, layer_idx):
        end = self.length + new.shape[2]
        if self.length == 0:
            buffers[layer_idx] = new
            return new
        buffer = buffers[layer_idx]
        if end > buffer.shape[2]:
            grown = new.new_empty(*new.shape[:2], end + max(256, end // 4), new.shape[3])
            grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffers[layer_idx] = buffer = grown
        buffer[:, :, self.length : end] = new
        return buffer[:, :, :end]

    def advance(self, new_tokens, real):
        """Call this when all layers have processed `new_tokens` tokens. `real` covers all tokens or is None."""
        self.length += new_tokens
        self.real = real

    def _map(self, change):
        for tensors in (self.keys, self.values, self.states):
            for layer_idx, tensor in tensors.items():
                tensors[layer_idx] = change(tensor)
        if self.real is not None:
            self.real = change(self.real)

    def reorder_cache(self, beam_idx):
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices):
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats):
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove):
        raise RuntimeError(
            "a HypeNetCache cannot be cropped: recurrent layers do not keep earlier states"
        )
