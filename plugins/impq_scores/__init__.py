"""Baseline estimators: scores from single demotions, gradients, activations, weights, or positions alone."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_estimators() -> list[Component]:
    """Estimators from measured losses, gradients, activations, weights, or positions alone."""
    return [
        Component("isolated", "impq_scores.played:Isolated", "each layer demoted alone"),
        Component("clado", "impq_scores.played:Clado", "single and double demotions (CLADO)"),
        Component("llm-mq", "impq_scores.gradients:LlmMq", "gradient times quantization error (LLM-MQ)"),
        Component("fisher", "impq_scores.gradients:Fisher", "second order from one backward a window, with pairs"),
        Component("aumann-shapley", "impq_scores.gradients:AumannShapley", "slopes along the path of all layers"),
        Component("token-fisher", "impq_scores.gradients:TokenFisher", "second order at a slightly quantized model"),
        Component("guided-output", "impq_scores.curvature:GuidedOutput", "output errors times output gradients"),
        Component("autoscheme", "impq_scores.curvature:AutoScheme", "gradient at each width times quantization error"),
        Component("gamma", "impq_scores.learned:Gamma", "shares learned by gradients under the budget (GAMMA)"),
        Component("coarse-to-fine", "impq_scores.fine:CoarseToFine",
                  "aumann-shapley, and measured moves of the layers nearest to another width"),
        Component("hawq", "impq_scores.gradients:Hawq", "Hessian trace times squared error of the weights (HAWQ-V2)"),
        Component("lim", "impq_scores.inspected:Lim", "how much a block turns its input (LIM)"),
        Component("activation", "impq_scores.inspected:Activation", "inverse size of a block's output, as in CoopQ"),
        Component("zscore", "impq_scores.inspected:ZScore", "share of outlying weights (ZD), data-free"),
        Component("lieq", "impq_scores.geometry:LieQ", "compactness against a random twin (LieQ)"),
        Component("kurtosis", "impq_scores.weights:Kurtosis", "heavy tails of the weights (KurtBoost), data-free"),
        Component("nsds", "impq_scores.weights:Nsds", "tails of weights and of singular vectors (NSDS), data-free"),
        Component("first-last", "impq_scores.inspected:FirstLast", "the nearer to an end, the more important"),
        Component("random", "impq_scores.inspected:Random", "random importance"),
    ]
