from tests.recipes.image_classification.test_table2 import assert_runs_of_the_paper


def test_the_hyper_parameters_are_the_paper_s(commands):
    assert_runs_of_the_paper(commands("table3"), "cifar100", {"sam": 0.1, "asam": 1.0})
