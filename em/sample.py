"""Generation with a key-value cache: prompts of different lengths in one batch, one token a row a step."""

import torch

from em.gpt2 import GPT2


@torch.inference_mode()
def generate(
    model: GPT2,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    max_new_tokens: int,
    stop: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Completions (B, max_new_tokens), `stop` from a row's first stop token on.

    prompts: (B, P) right-padded, lengths: (B,). Padding is never seen: a row's first new token overwrites
    its first padded slot, and slots beyond a row's position are masked. temperature 0 is greedy. Padded
    vocabulary rows are never sampled.
    """
    B, P = prompts.shape
    device, vocabulary = prompts.device, model.config.vocab_size
    on_gpu = device.type == "cuda"
    cache = model.new_cache(B, P + max_new_tokens, torch.bfloat16 if on_gpu else None)
    out = torch.full((B, max_new_tokens), stop, device=device)
    rows = torch.arange(B, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    positions = torch.arange(P, device=device).expand(B, P)
    tokens, last = prompts, lengths - 1
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        for step in range(max_new_tokens):
            hidden = model.hidden(tokens, positions, cache)
            hidden = hidden[rows, last] if step == 0 else hidden[:, 0]  # (B, d)
            logits = (hidden @ model.head_weight.t())[:, :vocabulary].float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                p = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(p, 1, generator=generator)[:, 0]
            token = torch.where(finished, stop, token)
            out[:, step] = token
            finished |= token == stop
            # On a GPU asking costs a synchronisation; ask now and then.
            if (not on_gpu or step % 8 == 7) and bool(finished.all()):
                break
            tokens, positions = token[:, None], (lengths + step)[:, None]
    return out
