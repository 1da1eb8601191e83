"""The backbone in plain PyTorch, without a trainer: learns to repeat what it saw 3 tokens before."""

import torch
from torch import nn

from hgrn2 import HGRN2Backbone, HGRN2Config

torch.manual_seed(0)
backbone = HGRN2Backbone(HGRN2Config(dim=32, depth=1, expand_ratio=8))
model = nn.Sequential(nn.Embedding(8, 32), backbone, nn.Linear(32, 8))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
for _ in range(150):
    tokens = torch.randint(8, (16, 24))
    loss = nn.functional.cross_entropy(model(tokens)[:, 3:].flatten(0, 1), tokens[:, :-3].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
