"""Language model: embedding -> causal backbone -> vocabulary.

The WikiText-103 frame of HGRN (arXiv 2311.04823) with the HGRN2 mixer: no positions, embedding tied to the output,
scaled by sqrt(dim). Legend: B batch, T tokens, D width.
"""

import torch
from torch import Tensor, nn

from hgrn2 import ConfigError, HGRN2Backbone, HGRN2Config
from hgrn2.ops.decode.graph import GraphedStep


class LanguageModel(nn.Module):
    """Tokens `[B, T]` -> logits `[B, T, vocab_size]`; embeddings start at N(0, dim^-0.5)."""

    def __init__(self, backbone: HGRN2Config, vocab_size: int, tie_embeddings: bool):
        super().__init__()
        if backbone.scan != "causal":
            raise ConfigError(f"model.backbone.scan={backbone.scan} does not fit language modelling; valid: causal")
        self.embed = nn.Embedding(vocab_size, backbone.dim)
        nn.init.normal_(self.embed.weight, std=backbone.dim**-0.5)
        self.scale = backbone.dim**0.5
        self.dropout = nn.Dropout(backbone.dropout)
        self.backbone = HGRN2Backbone(backbone)
        self.head = nn.Linear(backbone.dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=backbone.dim**-0.5)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, state: Tensor | None = None, return_state: bool = False):
        """Logits, or (logits, state) with `return_state`; state as `HGRN2Backbone.forward`."""
        if return_state:
            x, state = self.features(tokens, state, return_state=True)
            return self.head(x), state
        return self.head(self.features(tokens, state))

    def features(self, tokens: Tensor, state: Tensor | None = None, return_state: bool = False):
        """What `head` makes logits of: `[B, T, D]`, or that and the state."""
        return self.backbone(self.dropout(self.embed(tokens) * self.scale), state=state, return_state=return_state)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Tensor, gammas: list | None = None) -> Tensor:
        """One token a row `[B]` -> logits `[B, vocab_size]`; `state` is updated in place (`HGRN2Backbone.step`)."""
        return self.head(self.backbone.step(self.embed(tokens) * self.scale, state, gammas))

    @torch.no_grad()
    def generate(self, prompt: Tensor, new_tokens: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Continue prompts `[B, T]` (T >= 1) by sampling: `[B, T + new_tokens]`, in constant memory a token."""
        logits, state = self(prompt, return_state=True)
        logits, tokens, step = logits[:, -1], [prompt], GraphedStep(self.step, state, self.backbone.gammas())
        for i in range(new_tokens):
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probs = (logits.float() / temperature).softmax(-1).cpu()  # the generator lives on the host
                token = torch.multinomial(probs, 1, generator=generator).squeeze(1).to(prompt.device)
            tokens.append(token[:, None])
            if i + 1 < new_tokens:
                logits = step(token)
        return torch.cat(tokens, dim=1)
