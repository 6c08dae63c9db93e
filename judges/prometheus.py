"""prometheus_client's parser on /metrics; the names that `vllm bench serve` and dashboards read."""

from __future__ import annotations

import urllib.request
from importlib.metadata import version

from common import OPEN, Checks
from prometheus_client.parser import text_string_to_metric_families

check = Checks()
VLLM = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
    "request_success_total", "admission_rejections_total", "time_to_first_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
    "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
]  # fmt: skip


def read(accept: str) -> str:
    """The exposition."""
    request = urllib.request.Request(f"{OPEN}/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


families = list(text_string_to_metric_families(read("text/plain")))
names = {sample.name for family in families for sample in family.samples}
check("the text format parses", len(families) > 30, f"{len(families)} families")
check("every family has help", all(family.documentation for family in families))
asked = read("application/openmetrics-text; version=1.0.0; escaping=allow-utf-8, text/plain; q=0.5")
again = {sample.name for family in text_string_to_metric_families(asked) for sample in family.samples}
check("a scraper that prefers OpenMetrics reads it too", again == names)
missing = [name for name in VLLM if f"vllm:{name}" not in names]
check("vLLM's names", not missing, missing or f"{len(VLLM)} of them")
load = [s for family in families for s in family.samples if s.name == "fathom:expert_tokens_total"]
check(
    "the load of every expert", load and all({"layer", "expert"} <= set(s.labels) for s in load), f"{len(load)} series"
)
check.end(f"prometheus_client {version('prometheus_client')}: {len(families)} families, {len(names)} names")
