"""Test program: logits of transformers' own models. Arguments: `OUT FOLDER…`."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found[folder] = model(ids).logits
torch.save(found, sys.argv[1])
