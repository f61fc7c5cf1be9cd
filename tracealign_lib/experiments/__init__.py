"""What the chapters measure, on one world or pooled over several, and how it is published.

One module for each chapter; `common` holds what they share. An experiment takes pipelines (one per seed)
and returns headlines with intervals. A chapter calls it with its own pipeline; `tracealign publish NAME`
calls it with every seed of the profile `full` and writes data/results/<NAME>.json. Intervals are
bootstrapped by planted item: prompts about one item are not independent.
"""

from __future__ import annotations

# Functions of a device, as text: to list the names imports none of the libraries that measuring needs.
EXPERIMENTS = {
    "five-minutes": "tracealign_lib.experiments.five_minutes:publish_five_minutes",
    "model": "tracealign_lib.experiments.model:publish_model",
    "traceindex": "tracealign_lib.experiments.traceindex:publish_traceindex",
    "bci": "tracealign_lib.experiments.bci:publish_bci",
    "bound": "tracealign_lib.experiments.bound:publish_bound",
    "shield": "tracealign_lib.experiments.shield:publish_shield",
    "cbd": "tracealign_lib.experiments.cbd:publish_cbd",
    "cbd-harder": "tracealign_lib.experiments.cbd_harder:publish_cbd_harder",
    "prov-decode": "tracealign_lib.experiments.prov_decode:publish_prov_decode",
    "adb": "tracealign_lib.experiments.evaluation:publish_adb",
    "adb-whole": "tracealign_lib.experiments.evaluation:publish_adb_whole",
    "causal": "tracealign_lib.experiments.causal:publish_causal",
    "real-corpus": "tracealign_lib.experiments.real_corpus:publish_real_corpus",
    "adaptive": "tracealign_lib.experiments.adaptive:publish_adaptive",
    "coverage": "tracealign_lib.experiments.coverage:publish_coverage",
    "claims": "tracealign_lib.experiments.claims:publish_claims",
}
"""Where the function that publishes results of a name stands; `pkgutil.resolve_name` finds it."""
