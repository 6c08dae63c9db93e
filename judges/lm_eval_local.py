"""lm-eval's `local-completions`: log-likelihoods by echo and logprobs, rolling ones, and generation.

Tokens come from the server (`/tokenizer_info`, `/tokenize`), tasks from files that are written here. The task that can
be won asks which ending is real text of the kind that the model was trained on, and which is the same letters shuffled.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from common import MODEL, OPEN, Checks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

check = Checks()
ENDINGS = [
    ("The people of the United", " States have the right to be free"),
    ("The Congress of the", " United States shall have the power"),
    ("I have the honor to", " present to you the state of the nation"),
    ("The government of the", " country is in the hands of the people"),
    ("It is the duty of the", " President to see that the laws are executed"),
    ("We have made a treaty", " with the government of the other nation"),
    ("The public debt has", " been reduced in the course of the year"),
    ("Our relations with the", " powers of the world are those of peace"),
]


def shuffled(text: str, seed: int) -> str:
    letters = list(text)
    random.Random(seed).shuffle(letters)
    return "".join(letters)


def post(path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(OPEN + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def bits_by_hand() -> float:
    """Bits a byte of all texts, each after an end-of-text token, from prompt_logprobs."""
    nats, size = 0.0, 0
    with urllib.request.urlopen(f"{OPEN}/tokenizer_info") as answer:
        end = post("/tokenize", {"prompt": json.load(answer)["eos_token"]})["tokens"]
    for text in map("".join, ENDINGS):
        tokens = end + post("/tokenize", {"prompt": text})["tokens"]
        (choice,) = post("/v1/completions", {"prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0})["choices"]
        tables = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
        nats -= sum(table[str(token)]["logprob"] for token, table in tables)
        size += len(text.encode())
    return nats / size / math.log(2)


with tempfile.TemporaryDirectory() as folder:
    rows = [
        {"query": query, "choices": [right, shuffled(right, i), shuffled(right, i + 100)], "gold": 0}
        for i, (query, right) in enumerate(ENDINGS)
    ]
    data = Path(folder, "rows.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    tasks = [
        {**common, "task": "endings", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
         "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": "",
         "metric_list": [{"metric": "acc"}]},
        {**common, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{query}}{{choices[0]}}", "metric_list": [{"metric": "bits_per_byte"}]},
        {**common, "task": "writing", "output_type": "generate_until", "doc_to_text": "{{query}}",
         "doc_to_target": "{{choices[0]}}", "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
         "metric_list": [{"metric": "exact_match"}]},
    ]  # fmt: skip
    for task in tasks:
        Path(folder, f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    found = simple_evaluate(
        model="local-completions",
        model_args={"base_url": f"{OPEN}/v1/completions", "model": MODEL, "num_concurrent": 2, "max_length": 256},
        tasks=["endings", "rolling", "writing"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=4,
        log_samples=True,
    )

results = found["results"]
accuracy, bits = results["endings"]["acc,none"], results["rolling"]["bits_per_byte,none"]
check("loglikelihood: real endings are likelier than shuffled ones", accuracy == 1.0, f"accuracy {accuracy}")
by_hand = bits_by_hand()
check("loglikelihood_rolling", abs(bits - by_hand) < 1e-3, f"{bits:.4f} bits a byte; by prompt_logprobs {by_hand:.4f}")
written = [sample["resps"][0][0] for sample in found["samples"]["writing"]]
check("generate_until", len(written) == len(ENDINGS) and any(written), repr(written[0]))
check.end(f"lm-eval {version('lm_eval')}: accuracy {accuracy}, {bits:.3f} bits a byte")
