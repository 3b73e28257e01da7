"""Step-KTO (arXiv 2501.10799) in one file: sample, judge, train, repeat, in plain torch and transformers.

A model of 0.6M parameters solves chained word problems ("Max has 27 coins. Tom has 2 more than Max. ..."); it learned
them from a student with habitual mistakes, so 40% of its right answers contain a wrong step. Step-KTO trains it on its
own solutions with two binary signals: is each step right, and is the final answer right. Only the data come from the
package: the problems, and the exact rule that labels a step. tests/distributed/test_example.py compares the
package's first updates with this file's. Run it: python examples/step_kto_in_150_lines.py (--help lists the sizes).
"""

import argparse
import copy
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_stepkto.problems.chained_arithmetic.generate import generate
from megatron_stepkto.problems.chained_arithmetic.judge import label_steps

M0 = Path(__file__).parents[1] / "recipes" / "mini_cpu_m0"
BETA = {"outcome": 2.0, "step": 2.0}  # nats^-1: how fast the value function saturates
LAMBDA = {1: 1.0, 0: 0.5}  # weight of a right and of a wrong solution (or step)
LR, CLIP, BATCH = 1e-4, 1.0, 64


@dataclass
class Solution:
    prompt: list[int]  # x: token ids
    response: list[int]  # y: the sampler's own token ids, with the end token; never tokenised again
    steps: list[tuple[int, int]]  # half-open token spans that tile the response
    labels: list[int | None]  # c_h: 1 right, 0 wrong, None not judged (the answer line)
    outcome: int  # c: is the final answer right?
    partner: "Solution | None" = None  # y_j of another problem: (x_i, y_j) is the KL pair


def sample(model, tokenizer, problems, num_samples, temperature=1.0):
    """K solutions per problem, judged: a list of solutions per problem."""
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 96}
    groups = []
    for start in range(0, len(problems), 64):
        part = problems[start : start + 64]
        prompts = tokenizer([problem.problem + "\n" for problem in part])
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, **how, num_return_sequences=num_samples)[:, inputs["input_ids"].shape[1] :]
        for problem, prompt, ids in zip(part, prompts["input_ids"], output.split(num_samples), strict=True):
            groups.append([judge(tokenizer, problem, prompt, response) for response in ids.tolist()])
    for group, following in zip(groups, groups[1:] + groups[:1], strict=True):  # rotated: no problem is its own partner
        for solution, partner in zip(group, following, strict=True):
            solution.partner = partner
    return groups


def judge(tokenizer, problem, prompt, ids):
    """Cut a response into steps (lines), label each by the exact rule, and check the answer."""
    end, newline = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n")
    response = ids[: ids.index(end) + 1] if end in ids else ids
    cuts = [i + 1 for i, token in enumerate(response) if token == newline and response[i + 1 :] not in ([], [end])]
    steps = list(pairwise([0, *cuts, len(response)]))  # a newline and the end token belong to the step that they close
    lines = [tokenizer.decode(response[a:b], skip_special_tokens=True) for a, b in steps]
    text, ends = "".join(lines), list(accumulate(map(len, lines), initial=0))
    labels = label_steps(problem.problem, text, list(pairwise(ends)))
    return Solution(prompt, response, steps, labels, int(text.endswith(f"Answer: \\boxed{{{problem.answer}}}")))


def step_log_probs(model, pairs):
    """Sum of log pi(y_t | x, y_<t) over the tokens t of each step: one tensor [steps] per (prompt, solution)."""
    rows = [torch.tensor(prompt + solution.response) for prompt, solution in pairs]
    # padding comes behind: a causal model's tokens do not see it
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    log_probs = model(ids).logits[:, :-1].log_softmax(-1)
    tokens = log_probs.gather(2, ids[:, 1:, None])[..., 0].double()  # [batch, longest - 1]
    found = []
    for row, (prompt, solution) in zip(tokens, pairs, strict=True):
        own = row[len(prompt) - 1 :]  # the log-prob of a token is one position before it
        found.append(torch.stack([own[a:b].sum() for a, b in solution.steps]))
    return found


def reference_points(policy, reference, batch):
    """z_o and z_s: mean log-ratio of whole solutions and of judged steps over mismatched pairs, clamped at 0."""
    pairs = [(solution.prompt, solution.partner) for solution in batch if solution.partner]
    with torch.no_grad():
        ratios = torch.cat(step_log_probs(policy, pairs)) - torch.cat(step_log_probs(reference, pairs))
    judged = torch.tensor([label is not None for _, y in pairs for label in y.labels])
    z_outcome, z_step = ratios.sum() / len(pairs), ratios[judged].mean()
    return max(0.0, z_outcome.item()), max(0.0, z_step.item())


def term(ratio, z, label, level):
    """lambda_c - v(r, z, c): the Kahneman-Tversky value of a log-ratio, as a loss (KTO, eq. 8)."""
    return LAMBDA[label] * torch.sigmoid(BETA[level] * (z - ratio if label else ratio - z))


def step_kto_loss(policy, reference, batch):
    """Mean over solutions of the outcome term plus the mean of its judged steps' terms; also z_o and z_s."""
    z_outcome, z_step = reference_points(policy, reference, batch)
    own = [(solution.prompt, solution) for solution in batch]
    with torch.no_grad():
        base = step_log_probs(reference, own)
    loss = torch.zeros((), dtype=torch.float64)
    for solution, now, then in zip(batch, step_log_probs(policy, own), base, strict=True):
        ratio = now - then  # r_h of each step, nats
        loss = loss + term(ratio.sum(), z_outcome, solution.outcome, "outcome")
        steps = [term(r, z_step, c, "step") for r, c in zip(ratio, solution.labels, strict=True) if c is not None]
        if steps:
            loss = loss + torch.stack(steps).mean()
    return loss / len(batch), z_outcome, z_step


def update(policy, reference, optimizer, batch):
    """One optimizer step; returns loss, z_o, z_s and the gradient norm before clipping."""
    optimizer.zero_grad()
    loss, z_outcome, z_step = step_kto_loss(policy, reference, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
    optimizer.step()
    return loss.item(), z_outcome, z_step, norm.item()


def measure(name, model, tokenizer, problems):
    """The two figures that Step-KTO moves: right answers, and wrong steps inside right answers."""
    right = [s for (s,) in sample(model, tokenizer, problems, 1, temperature=0.7) if s.outcome]
    lucky = sum(0 in s.labels for s in right) / max(1, len(right))
    print(f"{name}: pass@1 {len(right) / len(problems):.1%}, right answers with a wrong step {lucky:.1%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("iterations", 3), ("problems", 320), ("samples", 8), ("test", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer, policy = AutoTokenizer.from_pretrained(M0), AutoModelForCausalLM.from_pretrained(M0).eval()
    test = generate("test", options.test, seed=0)
    measure("M0", policy, tokenizer, test)
    for t in range(1, options.iterations + 1):
        reference = copy.deepcopy(policy).requires_grad_(False)  # the model that samples
        groups = sample(policy, tokenizer, generate("train", options.problems, seed=t), options.samples)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
        for batch in DataLoader(list(chain(*groups)), BATCH, shuffle=True, collate_fn=list):
            loss, z_outcome, z_step, norm = update(policy, reference, optimizer, batch)
            print(f"M{t}: loss {loss:.4f} z_o {z_outcome:.3f} z_s {z_step:.3f} gradient {norm:.2f}", flush=True)
        measure(f"M{t}", policy, tokenizer, test)


if __name__ == "__main__":
    main()
