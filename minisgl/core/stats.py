"""The scheduler's figures, in plain numbers: they cross the process border."""

import msgspec


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Where the scheduler stands, and what it has done since it began."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int  # in the radix tree, shared with sequences or not
    num_idle_pages: int  # in the radix tree alone: evictable
    num_steps: int
    num_queried_tokens: int  # of prompts looked up in the cache
    num_hit_tokens: int  # of those, found
    num_spared_tokens: int  # of keys and values, not read again thanks to cascade groups
    num_preemptions: int
    num_forced_tokens: int  # of grammars, appended without being drawn
    num_drafts: int  # verified
    num_tried_drafts: int  # of those: up to the first of a step that was wrong
    num_accepted_drafts: int
    draft_gain: float  # tokens per second against those without drafts, as measured at this load
