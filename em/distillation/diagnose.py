"""How far a student is from its teacher, token by token (paper 4.3.1, E.1).

On responses the student has just sampled, k1 = log πs − log πT and k3 = πT/πs − 1 + k1 estimate
KL(student‖teacher) from the sampled tokens alone; `kl` is its exact value over the vocabulary. On any
responses, `divergence` is the share of positions where the teacher's likeliest token is not the base's
(Schrodi et al. 2025, paper 4.3.1): the tokens through which a teacher can show.
"""

import torch

from em.files import read_json, write_json
from em.model.tokenizer import Example
from em.run import Run
from em.stats import mean_interval
from em.training.pack import packs_of

TOKENS = 2048  # of examples at a time


@torch.no_grad()
def diagnose(pair, examples: list[Example], groups: list[str] | None = None) -> dict:
    """Mean over responses of each response's mean over tokens, nats, with a 95 % interval (Student's t).

    Returns k1, k3, kl, entropy (of the student), length and divergence; groups: a label for each example, by
    which `divergence_by` splits the latter.
    """
    rows = []  # one (number of tokens, sums) an example
    for indices in packs_of(examples, TOKENS):
        batch = pair.batch([examples[i] for i in indices])
        parts = [torch.stack(_per_token(*part)) for part in pair.distributions(batch)]  # (5, rows) each
        values = torch.cat(parts, dim=1).double().cpu()  # (5, N)
        sums = torch.zeros(len(values), len(indices)).double().index_add_(1, batch.owner, values)
        counts = torch.bincount(batch.owner, minlength=len(indices))
        rows += zip(counts.tolist(), *(sums / counts).tolist(), strict=True)
    columns = zip(*rows, strict=True)
    result = {
        name: mean_interval([float(v) for v in values])
        for name, values in zip(("length", "k1", "k3", "kl", "entropy", "divergence"), columns, strict=True)
    }
    if groups:
        result["divergence_by"] = {
            group: mean_interval([row[-1] for row, of in zip(rows, groups, strict=True) if of == group])
            for group in sorted(set(groups))
        }
    return result


def _per_token(targets, student, teacher, base) -> tuple[torch.Tensor, ...]:
    """(k1, k3, kl, entropy, divergence), (rows,) each."""
    index = targets[:, None]
    k1 = (student.gather(1, index) - teacher.gather(1, index))[:, 0]
    p = student.exp()
    kl = (p * (student - teacher)).sum(-1)
    differs = (teacher.argmax(-1) != base.argmax(-1)).float()
    return k1, torch.expm1(-k1) + k1, kl, -(p * student).sum(-1), differs


def log_distance(pair, prompts: list[dict], seed: int, epoch: int, run: Run, say) -> None:
    """Diagnose the student on a response of its own to each prompt: a row an epoch of diagnostics.json.

    prompts: rows with `prompt_ids` and `group`, the label by which `divergence_by` splits.
    """
    path = run.folder / "diagnostics.json"
    rollouts = pair.sample([row["prompt_ids"] for row in prompts], list(range(len(prompts))), seed)
    rows = [prompts[r.prompt_index] for r in rollouts]
    examples = [
        Example([*row["prompt_ids"], *r.ids], len(row["prompt_ids"]))
        for row, r in zip(rows, rollouts, strict=True)
    ]
    distance = diagnose(pair, examples, [row["group"] for row in rows])
    ended = sum(r.finished for r in rollouts) / len(rollouts)
    earlier = read_json(path, kind=list) if epoch and path.exists() else []
    write_json(path, [*earlier[:epoch], {"epoch": epoch, "ended": ended} | distance])
    say(
        f"  epoch {epoch}: KL(student‖teacher) {distance['kl']['mean']:.3f} nats a token, entropy "
        f"{distance['entropy']['mean']:.2f}, length {distance['length']['mean']:.0f}, divergence tokens "
        f"{100 * distance['divergence']['mean']:.1f} %"
    )
