"""Judge answers without writing any: how far is each token from the best one?

Greedy text depends on the processor: where two tokens are nearly tied, other rounding
takes the other, and the rest of the answer follows it. Fed its prompt and its answer,
a model is judged token by token, and a near tie costs little.
"""

import json

import torch

from course_utils.data import load_examples
from course_utils.evaluation import stratified
from course_utils.formatting import IGNORE, CompletionCollator, tokenize_example

# Logits that a token may lack. In float32 the worst token of the answers recorded with
# the kept prompt and prefix lacks 0.36, in bfloat16, where a step of a logit between 16
# and 32 is 0.125, it lacks 0.5. With one row of 20 zeroed it lacks 6, with the prompt's
# rows shuffled 5, at half their size 3.
MARGIN = 1.0


def lacking(model, tokenizer, prompts, answers, *, ended=None, batch_size=24):
    """Return for each answer the logits that its tokens lack to the best ones.

    A text does not say into which tokens the model split it ("so|aker" or "soa|ker"):
    where another token that the rest of the text begins with is likelier, that one is
    judged, and nothing after it.

    Args:
        model: a causal language model, with an adapter or without.
        tokenizer: its byte-level tokenizer; ChatML lays out the texts.
        prompts, answers: texts, one answer for each prompt.
        ended: for each answer, whether its end of turn was written too and is judged;
            None: of none.
        batch_size: examples at once.

    Returns:
        A list of float32 tensors [tokens], 0 where the token is the best one.
    """
    pairs = zip(prompts, answers, strict=True)
    rows = [
        tokenize_example({"prompt": p, "completion": a}, tokenizer) for p, a in pairs
    ]
    model.eval()
    result = []
    for start in range(0, len(rows), batch_size):
        batch = CompletionCollator(tokenizer)(rows[start : start + batch_size])
        batch = {name: values.to(model.device) for name, values in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            # virtual tokens, where there are any, stand before the text
            logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
        for scores, wanted in zip(logits, labels, strict=True):
            learned = wanted != IGNORE
            result.append(_gaps(scores[learned].cpu(), wanted[learned], tokenizer))
    ended = ended or [False] * len(rows)
    return [gaps if end else gaps[:-1] for gaps, end in zip(result, ended, strict=True)]


def _gaps(scores, ids, tokenizer):
    """Of one answer's tokens and its end; the newline after it is never written."""
    vocabulary = tokenizer.get_vocab()
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())[:-2]
    gaps = []
    for i, own in enumerate(ids.tolist()[:-1]):
        rest = "".join(tokens[i:])
        begins = {vocabulary.get(rest[:n], own) for n in range(1, 30)} | {own}
        best = max(begins, key=lambda token: scores[i, token].item())
        gaps.append(scores[i].max() - scores[i, best])
        if best != own:
            return torch.stack([*gaps, torch.tensor(0.0)])  # its end is not judged
    return torch.stack(gaps)


def worst(gaps):
    """The most that any token of any answer lacks."""
    return max(gap.max().item() for gap in gaps if len(gap))


def of_record(model, tokenizer, run, count):
    """What `count` recorded answers of a run lack, as `lacking` returns it.

    They are taken from all along the test. One that is JSON ended by itself; another
    may have been cut.
    """
    recorded = run["predictions"]
    asked = stratified(load_examples("home_commands", "test"), len(recorded))
    step = len(recorded) // count
    prompts, answers = [r["prompt"] for r in asked[::step]], recorded[::step]
    return lacking(model, tokenizer, prompts, answers, ended=[*map(_is_json, answers)])


def _is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
