"""Theory as code: what alignment at decoding time can reach, exactly where outcomes can be listed.

tilts: the optimum for a budget of KL divergence. best_of_n: distribution, divergence, win rate, and estimates from
draws. memoryless: long sequences. procedures, transforms, inference_aware: win rates after best-of-n or worst-of-n.
plots: the pictures of these (imported on its own, needs matplotlib). Takes numpy arrays and torch tensors, returns float64 numpy; nats everywhere.
"""

from .best_of_n import (
    best_of_n_interval,
    best_of_n_replicates,
    best_of_n_reward,
    bon_expected_rank,
    bon_expected_reward,
    bon_kl_bound,
    bon_kl_estimate,
    bon_kl_exact,
    bon_log_pmf,
    bon_win_rate,
    bon_win_rate_bound,
    n_for_kl,
    order_weights,
)
from .inference_aware import FrontierPoint, WinRate, exact_win_rate, frontier, inference_win_rate
from .memoryless import (
    LengthResult,
    best_of_n_at_length,
    cumulant,
    letter_alpha,
    mismatched_tilt,
    rate_function,
    renyi_cross_entropy,
    scaled_cumulant,
    types,
)
from .procedures import BestOfN, Identity, Procedure, WorstOfN, as_procedure
from .ranks import calibrate, calibrate_from_samples, win_rate
from .tilts import (
    alpha_for_reward,
    expected,
    kl_divergence,
    kl_max,
    kl_to_tilt,
    log_partition,
    solve_alpha,
    tilt,
    variance,
)
from .transforms import Transform, as_transform

__all__ = [
    "tilt", "solve_alpha", "alpha_for_reward", "kl_max", "kl_divergence", "kl_to_tilt", "log_partition", "expected", "variance",
    "bon_log_pmf", "bon_kl_exact", "bon_kl_bound", "bon_kl_estimate", "bon_win_rate", "bon_win_rate_bound",
    "bon_expected_rank", "bon_expected_reward", "n_for_kl", "order_weights", "best_of_n_reward", "best_of_n_replicates",
    "best_of_n_interval", "calibrate", "calibrate_from_samples", "win_rate",
    "mismatched_tilt", "cumulant", "scaled_cumulant", "renyi_cross_entropy", "letter_alpha", "rate_function", "types",
    "best_of_n_at_length", "LengthResult",
    "Procedure", "Identity", "BestOfN", "WorstOfN", "as_procedure", "Transform", "as_transform",
    "frontier", "FrontierPoint", "exact_win_rate", "inference_win_rate", "WinRate",
]  # fmt: skip
