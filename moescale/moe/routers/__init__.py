"""Routers decide which experts a token goes to, and the weight of each. All computed in float32.

| router        | experts       | weight                          | balance loss counts | drops               | causal |
|---------------|---------------|---------------------------------|---------------------|---------------------|--------|
| mixtral       | top_k         | softmax over the chosen logits+ | all choices         | nothing             | yes    |
| switch        | 1             | raw probability                 | the first choice    | over capacity       | yes *  |
| gshard        | 2             | normalised over both, then drop | first choices       | over it, or by coin | no     |
| sigmoid_bias  | top_k         | normalised sigmoid scores       | the top_k unbiased  | nothing             | yes    |
| expert_choice | that chose it | raw probability                 | none needed         | what none chose     | no     |
| sinkhorn      | top_k         | raw probability                 | all choices         | over capacity       | no     |

Weights are computed before anything is dropped, and not again afterwards. + Raw probabilities with
`normalize_weights: false`, as Jamba has them.

**Capacity** is counted per sequence, whichever ranks hold its positions: `capacity_factor` x its even share, at least
`min_capacity`; null = dropless. All first choices come before all second ones, and among them the earlier token, or,
with `drop_by: probability`, the token with the larger best probability. * With that, or with `left_behind_choices`
above one (a token whose expert is full tries the next one that it likes, where first choices have left room), switch is
not causal.

**The balance loss** counts choices before dropping, of valid tokens, over the sequence, the micro-batch or the global
batch (`balance_over`), and takes the mean probability over the same tokens, before it multiplies.

**In evaluation** nothing is random, and nothing dropped unless `eval_capacity_factor` says so. Tokens choose for
themselves: with expert_choice and sinkhorn their top_k by probability. **Decoding** is that without any capacity.

sigmoid_bias chooses by score plus a bias, which moves once a step, against the load of the global batch. With groups,
`top_k_groups` of them are chosen first, by the sum of each one's best top_k / top_k_groups (rounded down, never none).
"""

from moescale.moe.routers.base import Capacity, Router
from moescale.moe.routers.sequence_choice import SEQUENCE_CHOICE
from moescale.moe.routers.token_choice import TOKEN_CHOICE, SigmoidBiasRouter

ROUTERS: dict[str, type[Router]] = TOKEN_CHOICE | SEQUENCE_CHOICE

__all__ = ["ROUTERS", "Capacity", "Router", "SigmoidBiasRouter"]
