import pytest
import torch

from neuromanifold.belief import datasets


def test_lines_are_twelve_with_the_published_probabilities():
    data = datasets.lines(dtype=torch.float64)
    images = data.states.view(-1, 3, 3)
    columns = (images == images[:, :1]).all(dim=(1, 2))
    rows = (images == images[:, :, :1]).all(dim=(1, 2))
    assert len(data.states.unique(dim=0)) == 12
    assert columns.sum() == rows.sum() == 6
    assert (columns ^ rows).all()
    torch.testing.assert_close(
        data.probabilities, torch.where(columns, 2 / 18, 1 / 18).to(torch.float64)
    )


def test_bars_and_stripes_are_all_that_can_be_drawn():
    data = datasets.bars_and_stripes(3, coding=(-1, 1), dtype=torch.float64)
    assert len(data.states) == 2**4 - 2
    assert set(data.states.unique().tolist()) == {-1.0, 1.0}
    single = data.states.sum(1).abs() == 9
    expected = torch.where(single, 2 / 16, 1 / 16).to(torch.float64)
    torch.testing.assert_close(data.probabilities, expected)


def test_draws_follow_the_probabilities():
    data = datasets.lines(dtype=torch.float64)
    num = 20_000
    drawn = data.draw(num, generator=torch.Generator().manual_seed(0))
    counts = (drawn[:, None] == data.states).all(-1).sum(0) / num
    stderr = (data.probabilities * (1 - data.probabilities) / num).sqrt()
    assert ((counts - data.probabilities).abs() < 5 * stderr).all()


def test_the_data_have_no_kl_divergence_from_themselves():
    data = datasets.lines(dtype=torch.float64)
    torch.testing.assert_close(
        data.kl(data.probabilities.log()), torch.zeros((), dtype=torch.float64)
    )
    uniform = torch.full((12,), 1 / 512, dtype=torch.float64).log()
    torch.testing.assert_close(
        data.kl(uniform), 9 * torch.tensor(2.0).double().log() - data.entropy
    )


def test_digits_are_binary_and_split_without_overlap():
    digits = datasets.binarised_digits(coding=(-1, 1), generator=torch.Generator().manual_seed(0))
    assert len(digits.train) + len(digits.test) == 1797
    assert set(digits.train.unique().tolist()) == {-1.0, 1.0}
    again = datasets.binarised_digits(coding=(-1, 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(digits.test, again.test)


def test_shares_and_sides_out_of_range_are_refused():
    with pytest.raises(ValueError, match="in \\(0, 1\\)"):
        datasets.binarised_digits(test_share=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        datasets.bars_and_stripes(0)
