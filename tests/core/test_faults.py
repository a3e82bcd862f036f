"""The oracle is shown to be one: faults planted in the core are caught, each within few traces."""

import inspect
import sys
import textwrap

import pytest

from minisgl.core.cascade import PrefixGroups
from minisgl.core.kvcache import KVCache
from minisgl.core.pages import PagePool
from minisgl.core.planner import Planner
from minisgl.core.radix import RadixTree
from minisgl.core.running import Running
from minisgl.core.scheduler import Scheduler
from minisgl.core.sequence import Sequence
from minisgl.core.speculation import Speculation
from tests.world.trial import run_trial

MOST_TRIALS = 1500

# name: (class, method, what it says, what the fault makes of it)
FAULTS = {
    "shared pages are not held": (
        KVCache,
        "attach",
        "pool.hold(match.pages)",
        "pass",
    ),
    "the source of a copy is let go at once": (
        KVCache,
        "attach",
        "self._copies.append(",
        "self._drop([match.source]); pool.refs[match.source] += 1; self._copies.append(",
    ),
    "a copy is one token short": (
        KVCache,
        "attach",
        "target, match.num_copied)",
        "target, match.num_copied - 1)",
    ),
    "the whole prompt is matched, which leaves nothing to compute": (
        KVCache,
        "match",
        "sequence.num_tokens - 1",
        "sequence.num_tokens",
    ),
    "prompt log-probabilities with a prefix hit": (
        KVCache,
        "match",
        " or sequence.num_unscored",
        "",
    ),
    "salts are ignored": (
        KVCache,
        "release",
        "sequence.request.cache_salt",
        '""',
    ),
    "a match is used in the plan that computes it": (
        KVCache,
        "is_fresh",
        "return len(pages) > 0",
        "return False",
    ),
    "a running sequence shares a partly filled page": (
        KVCache,
        "commit",
        "stop // self.page_size",
        "-(-stop // self.page_size)",
    ),
    "adopted pages are not sent to the device, those left are dropped": (
        KVCache,
        "_adopt",
        "kv.num_patched = min(kv.num_patched, int(changed[0]))",
        "pass",
    ),
    "adopted pages are not held": (
        KVCache,
        "_adopt",
        "self.pool.hold(",
        "list(",
    ),
    "what the chunk itself writes is swapped": (
        KVCache,
        "commit",
        "self._adopt(sequence, canonical[:own])",
        "self._adopt(sequence, canonical)",
    ),
    "pages stay in an ended sequence": (
        KVCache,
        "release",
        "pages, sequence.kv = sequence.kv.pages, HeldPages()",
        "pages = sequence.kv.pages",
    ),
    "tokens that were not computed are cached": (
        KVCache,
        "release",
        "min(sequence.num_computed, sequence.num_tokens)",
        "sequence.num_tokens",
    ),
    "a split mixes up the pages": (
        RadixTree,
        "_split",
        "node.pages[num_pages:]",
        "node.pages[: len(node.pages) - num_pages]",
    ),
    "a longer run does not replace the partly filled page": (
        RadixTree,
        "_extend",
        "(leaf.pages[:whole], pages[whole:])",
        "(leaf.pages, pages[whole + len(old) :])",
    ),
    "eviction forgets the mark": (
        PagePool,
        "uncache",
        "self.cached[index] = False",
        "pass",
    ),
    "idle pages are miscounted": (
        PagePool,
        "hold",
        "(refs == 1)",
        "(refs == 2)",
    ),
    "a token after the end": (
        Scheduler,
        "update",
        "if seq.status is not ENDED:",
        "if True:",
    ),
    "rows and pages go back while a step is in flight": (
        Running,
        "settle",
        " or seq.in_flight",
        "",
    ),
    "a preempted sequence loses its late token": (
        Scheduler,
        "update",
        "if seq.status is not ENDED:",
        "if seq.status is RUNNING:",
    ),
    "what a preempted sequence holds is not counted as its input": (
        Running,
        "start",
        "seq.num_fed = seq.num_tokens",
        "seq.num_fed = len(seq.prompt)",
    ),
    "a preempted sequence keeps its epoch": (
        Running,
        "settle",
        "seq.epoch += 1",
        "pass",
    ),
    "rejected drafts count as computed": (
        Scheduler,
        "_take_tokens",
        "seq.num_computed += num_accepted",
        "seq.num_computed += num_drafts",
    ),
    "unread drafts get no pages": (
        Planner,
        "_plan_decode",
        "start + seq.num_slack + 1, seq.num_tokens",
        "start + 1, seq.num_tokens",
    ),
    "drafts that were rejected count as the draft model's": (
        Speculation,
        "take",
        "seq.kv.num_drafted += num_accepted",
        "seq.kv.num_drafted += num_drafts",
    ),
    "the draft model's own last proposal counts as computed": (
        Speculation,
        "planned",
        "seq.kv.num_drafted = start",
        "seq.kv.num_drafted = start + 1",
    ),
    "a page keeps the mark of what the draft model computed for another": (
        KVCache,
        "_take",
        "self._drafted[pages] = 0",
        "pass",
    ),
    "a copied page counts as the draft model's, whatever its source": (
        KVCache,
        "attach",
        "min(self._drafted[match.source], match.num_copied)",
        "match.num_copied",
    ),
    "a prefix hit counts as the draft model's": (
        KVCache,
        "_num_drafted",
        "self._drafted is None",
        "True: return most\n    if False",
    ),
    "a step is planned past the known end": (
        Planner,
        "_plan_decode",
        "ahead >= seq.limit",
        "seq.num_tokens >= seq.limit",
    ),
    "new pages are not sent to the device": (
        Planner,
        "_plan_decode",
        "pages = seq.kv.patch(seq.kv.count)",
        "seq.kv.patch(seq.kv.count)",
    ),
    "the end is not looked for at every token": (
        Sequence,
        "accept",
        "enumerate(new, 1)",
        "[(len(new), self.output.extend(new[:-1]) or new[-1])]",
    ),
    "cascade groups are not put together": (
        PrefixGroups,
        "arrange",
        "return list(pick(sequences)), list(pick(chunks)), self._groups",
        "return sequences, chunks, self._groups",
    ),
    "cascade groups of a step are used in the next": (
        PrefixGroups,
        "arrange",
        "self._chosen and sequences != self._arranged",
        "False",
    ),
    "what a step samples is appended, though it was foretold": (
        Scheduler,
        "update",
        " and not _is_foretold(seq, output.token_ids[index])",
        "",
    ),
    "tokens whose log-probabilities are wanted are forced": (
        Scheduler,
        "force",
        "params.logprobs is not None or",
        "",
    ),
    "forced tokens come before the prompt's log-probabilities": (
        Scheduler,
        "force",
        "seq.num_unscored or",
        "",
    ),
    "forced tokens are not counted by penalties": (
        Scheduler,
        "force",
        " or params.needs_counts",
        "",
    ),
    "drafts that a grammar forces are computed again": (
        Scheduler,
        "_append_forced",
        "seq.num_computed += num_accepted",
        "pass",
    ),
    "drafts that a grammar decides about stay undecided": (
        Scheduler,
        "_append_forced",
        "seq.num_pending = seq.num_slack = 0",
        "seq.num_pending = 0",
    ),
    "forced tokens get no pages": (
        Planner,
        "_plan_decode",
        "seq.num_slack + 1, seq.num_tokens",
        "seq.num_slack + 1, 0",
    ),
    "min_tokens is ignored": (
        Sequence,
        "accept",
        ">= self.request.params.min_tokens",
        ">= 0",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    owner, method, said, planted = FAULTS[name]
    function = getattr(owner, method)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(said) == 1, "the fault no longer fits the code"
    scope: dict = {}
    exec(source.replace(said, planted), sys.modules[owner.__module__].__dict__, scope)
    monkeypatch.setattr(owner, method, scope[method])
    for seed in range(MOST_TRIALS):
        try:
            run_trial(seed)
        except Exception:
            return
    pytest.fail(f"not caught in {MOST_TRIALS} traces")
