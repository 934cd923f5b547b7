"""Token weights against plain loops."""

import itertools

import pytest
import torch

from tests.oracles import mean_loss
from trl_crisp.loss.weighting import count_loss_items, loss_token_weights

MASKS = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("split", [[0, 4], [0, 1, 2, 3, 4], [0, 2, 4], [0, 3, 4]])
def test_weights_over_any_split_equal_the_oracle(normalization, split):
    """The same loss however the global batch is cut; a rollout without a token in the loss does not count."""
    values = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(MASKS)
    pieces = [slice(a, b) for a, b in itertools.pairwise(split)]
    num_items = sum(count_loss_items(mask[piece], normalization) for piece in pieces)
    assert num_items == {"sequence": 3, "token": 7}[normalization]
    loss = sum(
        (loss_token_weights(mask[piece], normalization, num_items).double() * values[piece]).sum() for piece in pieces
    )
    assert float(loss) == pytest.approx(mean_loss(values.tolist(), MASKS, normalization), rel=1e-6)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_all_masked_weighs_nothing(normalization):
    """No division by zero."""
    weights = loss_token_weights(torch.zeros(2, 3), normalization, 1.0)
    assert torch.equal(weights, torch.zeros(2, 3))
