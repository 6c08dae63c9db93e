"""What Prometheus reads: the engine's totals at the moment of the question, and times of what has ended.

Names are vLLM's (`vllm:*`, with its label model_name) where the meaning is the same, so that its dashboards and
`vllm bench serve` read them; `fathom:*` is our own. The registry is the app's own: two apps in a process share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fathom.serve.engine import End, Stats

LABEL = "model_name"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
REASONS = ("stop", "length", "abort", "error")  # vLLM's words for how a request ended
REASON_OF = {"stop": "stop", "length": "length", "cancelled": "abort", "deadline": "abort", "failed": "error"}


class EngineCollector(Collector):
    """`Stats` as metrics, read when somebody asks."""

    def __init__(self, stats: Callable[[], Stats], model: str) -> None:
        self.stats, self.model = stats, model

    def describe(self) -> list[Metric]:
        """Nothing is asked of the engine when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        yield from self._gauges(stats)
        yield from self._totals(stats)
        yield from self._drafts(stats)
        yield from self._experts(stats)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        metric = GaugeMetricFamily(name, help, labels=[LABEL])
        metric.add_metric([self.model], value)
        return metric

    def _counter(self, name: str, help: str, value: float) -> Metric:
        metric = CounterMetricFamily(name, help, labels=[LABEL])
        metric.add_metric([self.model], value)
        return metric

    def _gauges(self, stats: Stats) -> Iterator[Metric]:
        used = stats.cache_blocks_used / stats.cache_blocks if stats.cache_blocks else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests that the engine works on.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for their turn.", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of cache blocks in use; 1 is all.", used)
        yield self._gauge("fathom:cache_blocks", "Cache blocks.", stats.cache_blocks)
        yield self._gauge("fathom:cache_blocks_used", "Cache blocks that requests hold.", stats.cache_blocks_used)
        yield self._gauge("fathom:cache_block_tokens", "Tokens that a cache block holds.", stats.block_size)
        yield self._gauge("fathom:cache_bytes", "Memory of the cache, full or not.", stats.cache_bytes)
        yield self._gauge("fathom:speculating", "1 while MTP depths draft.", stats.speculating)

    def _totals(self, stats: Stats) -> Iterator[Metric]:
        yield self._counter("vllm:num_preemptions", "Requests put back because the cache was full.", stats.preemptions)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hits)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens of answers.", stats.generation_tokens)
        yield self._counter("fathom:engine_steps", "Passes through the model.", stats.steps)
        yield self._counter("fathom:engine_step_tokens", "Tokens of all passes.", stats.step_tokens)

    def _drafts(self, stats: Stats) -> Iterator[Metric]:
        yield self._counter("vllm:spec_decode_num_drafts", "Rounds of drafting.", stats.drafts)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted.", stats.draft_tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafts accepted.", stats.accepted_tokens)
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted, by their place in the draft.",
            labels=[LABEL, "position"],
        )
        for place, count in enumerate(stats.accepted_per_position):
            places.add_metric([self.model, str(place)], count)
        yield places

    def _experts(self, stats: Stats) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "fathom:expert_tokens", "Tokens that an expert was given.", labels=[LABEL, "layer", "expert"]
        )
        worst = GaugeMetricFamily(
            "fathom:expert_max_vio",
            "MaxVio of a layer since the start: the fullest expert's tokens over the mean, less 1.",
            labels=[LABEL, "layer"],
        )
        for layer, counts in stats.expert_tokens.items():
            for expert, count in enumerate(counts):
                tokens.add_metric([self.model, str(layer), str(expert)], count)
            worst.add_metric([self.model, str(layer)], max_vio(counts))
        yield tokens
        yield worst


def max_vio(counts: Sequence[int]) -> float:
    """max / mean - 1; 0 before the first token."""
    total = sum(counts)
    return max(counts) * len(counts) / total - 1 if total else 0.0


class Meters:
    """Everything that is counted, and its text."""

    def __init__(self, stats: Callable[[], Stats], model: str) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(EngineCollector(stats, model))

        def times(name: str, help: str, buckets: Sequence[float] = SECONDS) -> Histogram:
            return Histogram(name, help, [LABEL], registry=registry, buckets=buckets).labels(model)

        self.first_token = times("vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self.gap = times("vllm:request_time_per_output_token_seconds", "Mean time a token after the first.", GAPS)
        self.whole = times("vllm:e2e_request_latency_seconds", "From arrival to the end.")
        self.queued = times("vllm:request_queue_time_seconds", "Waiting for a turn.")
        self.prefill = times("vllm:request_prefill_time_seconds", "Reading the prompt.")
        self.decode = times("vllm:request_decode_time_seconds", "Writing the answer after its first token.")
        self.prompt = times("vllm:request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self.answer = times("vllm:request_generation_tokens", "Tokens of an answer.", COUNTS)
        success = Counter("vllm:request_success", "Requests by how they ended.", [LABEL, "finished_reason"],
                          registry=registry)  # fmt: skip
        self.ends = {reason: success.labels(model, reason) for reason in REASONS}
        self.http = Counter("fathom:http_requests", "HTTP requests.", ["method", "path", "status"], registry=registry)
        self.refused = Counter(
            "vllm:admission_rejections", "Requests refused because the queue was full.", [LABEL], registry=registry
        ).labels(model)

    def ended(self, end: End) -> None:
        """A request of the engine has ended."""
        timing, tokens = end.timing, len(end.completion.tokens)
        self.ends[REASON_OF[end.why]].inc()
        self.prompt.observe(len(end.completion.prompt_ids))
        self.answer.observe(tokens)
        self.whole.observe(timing.total)
        self.queued.observe(timing.queued)
        if timing.first_token is None:
            return
        self.first_token.observe(timing.first_token)
        self.prefill.observe(timing.prefill)
        self.decode.observe(timing.decode)
        if tokens > 1:
            self.gap.observe(timing.decode / (tokens - 1))

    def text(self) -> tuple[bytes, str]:
        """The exposition, and its content type: Prometheus' text format, whatever else a scraper might prefer, because
        prometheus_client spells names with a colon in two ways in OpenMetrics."""
        encode, kind = choose_encoder("")
        return encode(self.registry), kind
