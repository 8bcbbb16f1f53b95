"""FactoredOutput against nn.Linear and torch's SGD; errors leave the state as it was."""

import copy

import pytest
import torch

from fastloss.spherical.modules import FactoredOutput


@pytest.mark.parametrize("bias", [True, False])
def test_follows_linear_and_sgd(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 30, bias=bias, dtype=torch.float64)
    layer = FactoredOutput.from_linear(linear, loss="mse", accumulate=True)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
            dense = (linear(x) - torch.nn.functional.one_hot(y, 30)).square().sum(1).mean()
            loss = layer(x, y)
            torch.testing.assert_close(loss, dense)
            dense.backward()
            loss.backward()
        optimizer.step()
        layer.step(0.01, 0.1)
    torch.testing.assert_close(layer.weight()[:, :5], linear.weight.detach(), rtol=1e-9, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.weight()[:, 5], linear.bias.detach(), rtol=1e-9, atol=1e-12)


def test_errors_leave_the_state() -> None:
    layer = FactoredOutput(4, 9)
    before = copy.deepcopy(layer.state_dict())
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    with pytest.raises(RuntimeError, match="no gradient"):
        layer.step(0.1)
    with pytest.raises(ValueError, match=r"in \[0, 9\)"):
        layer(x, y + 8)
    layer(x, y).backward()
    with pytest.raises(RuntimeError, match="second forward"):
        layer(x, y)
    with pytest.raises(ValueError, match="finite"):
        layer.step(float("nan"))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
