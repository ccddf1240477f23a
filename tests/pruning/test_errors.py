import pickle

import pytest

from prunegym.pruning.errors import InfeasibleBudgetError, PruningError, UnsupportedLayerError, unknown_name

MANY = [f"cifar_resnet{depth}" for depth in range(20, 60)]


@pytest.mark.parametrize("error", [PruningError, InfeasibleBudgetError, UnsupportedLayerError])
def test_every_error_is_a_value_error(error: type[PruningError]) -> None:
    """Callers who know only the built-in errors can still catch ours."""
    assert issubclass(error, PruningError)
    assert issubclass(error, ValueError)


def test_infeasible_budget_keeps_what_is_reachable_when_pickled() -> None:
    """Errors cross process boundaries when an environment runs in a worker."""
    error = pickle.loads(pickle.dumps(InfeasibleBudgetError("too small", reachable=0.25)))

    assert str(error) == "too small"
    assert error.reachable == 0.25


def test_unknown_name_says_argument_rule_value_and_nearest() -> None:
    """A typing error is answered with the name that was meant."""
    error = unknown_name("--network", "resnet2", ["resnet56", "resnet20"])

    assert str(error) == (
        "`--network` should be one of 'resnet20', 'resnet56'. Received 'resnet2'. Did you mean 'resnet20'?"
    )


def test_unknown_name_ends_with_the_remedy() -> None:
    """The caller's remedy is the last sentence."""
    assert str(unknown_name("--data", "x", ["digits"], "Name a folder.")).endswith("Name a folder.")


def test_unknown_name_does_not_print_a_long_list() -> None:
    """Of forty names only the near ones are shown."""
    message = str(unknown_name("--network", "cifar_resnet2o", MANY))

    assert "one of 40 known names" in message
    assert "Did you mean 'cifar_resnet2" in message
    assert "'cifar_resnet59'" not in message


def test_unknown_name_finds_names_that_contain_what_was_typed() -> None:
    """`resnet20` is far from `cifar_resnet20` letter by letter, and yet what was meant."""
    assert "Did you mean 'cifar_resnet20'?" in str(unknown_name("--network", "resnet20", MANY))


def test_unknown_name_ignores_case() -> None:
    """Names in capitals are the same names."""
    assert "Did you mean 'digits'?" in str(unknown_name("--data", "DIGITS", ["digits", "cifar10"]))


@pytest.mark.parametrize("value", ["", "zzz", "résnet", "a" * 500])
def test_unknown_name_suggests_nothing_when_nothing_is_near(value: str) -> None:
    """A far-fetched suggestion is worse than none."""
    assert "Did you mean" not in str(unknown_name("--network", value, ["digits", "cifar10"]))


def test_unknown_name_without_any_choice_still_makes_a_sentence() -> None:
    """An empty registry does not break the message."""
    assert str(unknown_name("--x", "y", [])) == "`--x` has no known names. Received 'y'."
