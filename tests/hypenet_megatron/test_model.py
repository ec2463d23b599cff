import torch
from hypenet_megatron.config import HypeNetConfig
from hypenet_megatron.model import HypeNetModel
from hypenet_megatron.presets import ModelShape

TINY = ModelShape("tiny", 4, 64, 96, 4, 2, 16, 128, tied_embeddings=True)


def test_forward(megatron_cpu):
    config = HypeNetConfig.from_shape(TINY, TINY.hybrid_mixers((1,)), hybrid=True)
    model = HypeNetModel(config).eval()
    out = model(torch.randint(0, 128, (2, 40)))
    assert out.shape == (40, 2, 64)
    print([ (n, tuple(p.shape)) for n,p in model.named_parameters()])
