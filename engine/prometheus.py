"""What a server counts, as text for Prometheus, under the names that vLLM gives the same things."""

from bisect import bisect_left

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # upper bounds


class Histogram:
    """How many values lay up to each bound, and their sum."""

    def __init__(self):
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(SECONDS, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        found, below = [], 0
        for bound, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{{labels},le="{bound}"}} {below}')
        return [*found, f"{name}_sum{{{labels}}} {self.total}", f"{name}_count{{{labels}}} {below}"]


def text(engine, model: str) -> str:
    """All figures of `engine`, of a server that calls its model so."""
    model = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = f'model_name="{model}"'
    running, waiting, counts = engine.number_running(), engine.number_waiting(), engine.counts
    gauges = dict(num_requests_running=running, num_requests_waiting=waiting)
    gauges |= dict(kv_cache_usage_perc=engine.used())
    counters = dict(prompt_tokens=counts["prompt"], generation_tokens=counts["generation"])
    histograms = dict(time_to_first_token_seconds=engine.first)
    histograms |= dict(inter_token_latency_seconds=engine.between)
    histograms |= dict(e2e_request_latency_seconds=engine.whole)
    lines = []
    for name, value in gauges.items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}}} {value}"]
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name}_total counter", f"vllm:{name}_total{{{labels}}} {value}"]
    lines.append("# TYPE vllm:request_success_total counter")
    for reason in ("stop", "length", "content_filter", "abort"):
        more = f'{labels},finished_reason="{reason}"'
        lines.append(f"vllm:request_success_total{{{more}}} {counts[reason]}")
    for name, histogram in histograms.items():
        lines += [f"# TYPE vllm:{name} histogram", *histogram.lines(f"vllm:{name}", labels)]
    return "\n".join(lines) + "\n"
