"""Why a plan has its chunks, or why nothing fits."""

from __future__ import annotations

from varstream.planner.choose import CPU_CHUNK, SMALL_PART, Choice, Job, choose
from varstream.planner.memory import STATES, WEIGHTS
from varstream.planner.report import size_words


def reason(job: Job, choice: Choice, peak: int, longest: int | None) -> str:
    """In words; ``longest``: the most tokens that fit the budget, if there is one."""
    if not choice.fits:
        assert longest is not None and job.budget is not None
        return _why_not(job, choice, peak, longest)
    if choice.default_chunk == 0:
        words = f"Chunks of {choice.chunk:,} rows as asked"
    elif choice.chunk != choice.default_chunk:
        size = "smaller" if choice.chunk < choice.default_chunk else "larger"
        words = (
            f"The default chunks of {choice.default_chunk:,} rows would pass the budget; "
            f"{choice.chunk:,} are the next {size} that fit"
        )
    elif not job.step.device.cuda and choice.chunk > max(CPU_CHUNK, 2 * choice.knee - 1):
        words = (
            f"Chunks of {choice.chunk:,} rows cost little here: their activations are at most "
            f"1/{SMALL_PART} of a layer's backward, or the head's peak is the higher one"
        )
    else:
        words = f"Chunks of {choice.chunk:,} rows are the default"
    return " ".join([words + ".", choice.below_knee]).rstrip()


def _why_not(job: Job, choice: Choice, peak: int, longest: int) -> str:
    budget = size_words(job.budget or 0)
    resident = job.resident
    before = sum(resident.values())
    need = f"{job.step.tokens:,} tokens need {size_words(peak)} of {budget}"
    if longest > 0:
        smaller = (
            "the smallest chunks"
            if "auto" == job.chunk_size == job.head_chunk_size
            else f"chunks of {choice.chunk:,} and {choice.head_chunk:,} rows"
        )
        return (
            f"{need} with {smaller} ({size_words(before)} before the step begins); "
            f"pass at most {longest:,} tokens a step or a larger budget."
        )
    least = _least(job)
    return (
        f"{need} and even one token needs {size_words(least)} "
        f"({size_words(resident[WEIGHTS])} weights, "
        f"{size_words(job.shape.trained.bytes)} gradients, "
        f"{size_words(resident[STATES])} optimizer states); "
        "use a larger budget, a smaller dtype, fewer trained parameters or another optimizer."
    )


def _least(job: Job) -> int:
    """Bytes of the same job with one token and the smallest chunks."""
    choice = choose(job.at(1))
    moments = [*choice.moments, choice.optimizer]
    return sum(job.resident.values()) + max(moment.total for moment in moments)
