"""What the scheduler itself costs, without a device: microseconds per request and step, and a flood.

    python -m benchmarks.scheduler_cost

Every request decodes, none finishes, a block of 16 tokens fills up now and then: what a step costs in the
long run. The flood is a burst of arrivals over the queue's bound, refused in one step.
Target: schedule, predict and commit together ≤ 5 µs per request and step at 32 to 256 requests.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from penstock.core.blocks import BlockPool
from penstock.core.plan import Outcome, StepResult
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import Scheduler, SchedulerConfig

from .common import save

TARGET_US = 5.0
REQUESTS = (1, 32, 64, 128, 256)
ARRIVALS, BOUND = 6000, 200


def _specs(count: int) -> list[RequestSpec]:
    """As a server names them; no two prompts are alike."""
    return [
        RequestSpec(
            id=f"chatcmpl-{number:032x}#{number}",
            prompts=(Prompt(tuple(range(number, number + 20)), 3000),),
            sampling=Sampling(),
        )
        for number in range(count)
    ]


def decode_us(requests: int, steps: int = 400) -> tuple[float, float]:
    """(median, least) microseconds per request and step."""
    config = SchedulerConfig(max_num_seqs=requests, max_num_batched_tokens=8192, max_model_len=4096)
    scheduler = Scheduler(config, BlockPool(300 + 100 * requests, 16))
    for spec in _specs(requests):
        scheduler.add(spec, 0.0)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        plan = scheduler.schedule(0.0)
        scheduler.cost.predict(plan)
        planned = time.perf_counter() - began
        result = StepResult(plan.step, 0.01, tuple(Outcome((5,)) for _ in plan.items))
        began = time.perf_counter()
        scheduler.commit(plan, result, 0.0)
        times.append(1e6 * (planned + time.perf_counter() - began) / requests)
    return statistics.median(times[10:]), min(times[10:])


def flood_ms(arrivals: int = ARRIVALS, bound: int = BOUND) -> float:
    """Milliseconds of the step that refuses what is over the bound."""
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096, max_num_queued_reqs=bound
    )
    scheduler = Scheduler(config, BlockPool(1000, 16))
    for spec in _specs(arrivals):
        scheduler.add(spec, 0.0)
    began = time.perf_counter()
    scheduler.schedule(0.0)
    refused = scheduler.take_events()
    took = time.perf_counter() - began
    assert len(refused) == arrivals - bound - 8
    return 1e3 * took


def run(rounds: int = 5) -> dict[str, Any]:
    """Medians over some rounds, each size by turns; and the least, which says what a busy machine hides."""
    decode = [{count: decode_us(count) for count in REQUESTS} for _ in range(rounds)]
    return {
        "decode_us": {count: statistics.median(each[count][0] for each in decode) for count in REQUESTS},
        "least_us": {count: min(each[count][1] for each in decode) for count in REQUESTS},
        "flood_ms": statistics.median(flood_ms() for _ in range(rounds)),
        "rounds": decode,
    }


def main() -> None:
    """Command line."""
    result = run()
    save("scheduler_cost", result)
    print(f"µs per request and step (target ≤ {TARGET_US:g} from 32 requests on)")
    for count, us in result["decode_us"].items():
        print(f"{count:4} requests  median {us:6.2f}  least {result['least_us'][count]:6.2f}")
    print(f"{ARRIVALS:,} arrivals over a bound of {BOUND} refused in {result['flood_ms']:.1f} ms")


if __name__ == "__main__":
    main()
