"""Baseline estimators: scores from weights, activations, gradients, single demotions, or nothing at all."""

from impq_core.hookspecs import hookimpl
from impq_core.plugins import Component


@hookimpl
def impq_estimators() -> list[Component]:
    """``isolated``, ``llm-mq``, ``lim``, ``activation``, ``zscore``, ``first-last``, ``random``."""
    return [
        Component("isolated", "impq_scores.played:Isolated", "each layer demoted alone"),
        Component("llm-mq", "impq_scores.inspected:LlmMq", "gradient times quantization error (LLM-MQ)"),
        Component("lim", "impq_scores.inspected:Lim", "how much a block turns its input (LIM)"),
        Component("activation", "impq_scores.inspected:Activation", "inverse size of a block's output, as in CoopQ"),
        Component("zscore", "impq_scores.inspected:ZScore", "share of outlying weights (ZD), data-free"),
        Component("first-last", "impq_scores.inspected:FirstLast", "the nearer to an end, the more important"),
        Component("random", "impq_scores.inspected:Random", "random importance"),
    ]
