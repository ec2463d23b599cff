"""Scores evaluation batches with a Megatron model: one forward pass, and logits only at the scored positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from halo_evaluation.interface import ScoreBatch, TokenScores
from hypenet_megatron.model import DecoderModel

_TOKENS_PER_CHUNK = 1024


def to_device(batch: ScoreBatch, device: torch.device) -> Tensor:
    """input_ids [items, length] of a batch as an int64 tensor."""
    return torch.from_numpy(np.ascontiguousarray(batch.input_ids)).to(device)


def score_hidden(model: DecoderModel, hidden: Tensor, batch: ScoreBatch) -> TokenScores:
    """Scores from final hidden states [length, items, d]. Position t - 1 predicts token t."""
    items, positions = np.nonzero(batch.target_mask)
    rows = hidden[torch.from_numpy(positions - 1), torch.from_numpy(items)]
    targets = torch.from_numpy(batch.input_ids[items, positions]).to(hidden.device)
    log_probability = np.zeros(batch.target_mask.shape, np.float32)
    is_greedy = np.zeros(batch.target_mask.shape, bool)
    for start in range(0, len(items), _TOKENS_PER_CHUNK):
        part = slice(start, start + _TOKENS_PER_CHUNK)
        logits = model.logits(rows[part]).float()
        chosen = logits.log_softmax(-1).gather(-1, targets[part, None])[:, 0]
        log_probability[items[part], positions[part]] = chosen.cpu().numpy()
        is_greedy[items[part], positions[part]] = (logits.argmax(-1) == targets[part]).cpu().numpy()
    return TokenScores(log_probability, is_greedy)


@torch.no_grad()
def score_batch(model: DecoderModel, device: torch.device, batch: ScoreBatch) -> TokenScores:
    """Scores of a teacher or hybrid that this process holds completely."""
    model.eval()
    return score_hidden(model, model(to_device(batch, device)), batch)
