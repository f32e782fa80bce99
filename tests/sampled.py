"""The rollouts of a single call, which is what most tests of sampling want."""

from em.sampling.sampler import Rollout, Sampler


def sample(model, prompts, stop_ids, max_new_tokens: int, **options) -> list[Rollout]:
    """In order; options are those of `Sampler` and of its call."""
    call = {name: options.pop(name) for name in ("n", "seed", "indices") if name in options}
    return Sampler(model, stop_ids, max_new_tokens, **options)(prompts, **call)
