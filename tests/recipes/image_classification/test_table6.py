def test_every_noise_rate_has_every_optimizer_and_seed(commands):
    runs = commands("table6")
    found = [(run.label_noise, run.optimizer, run.seed) for run in runs]
    noise = (0.0, 0.2, 0.4, 0.6, 0.8)
    assert found == [(n, o, s) for n in noise for o in ("sgd", "sam", "asam") for s in (1, 2, 3)]
    assert {(run.dataset, run.model) for run in runs} == {("cifar10", "resnet32")}
    assert [run.label_noise for run in commands("table6", "--rows", "40%", "--seeds", "1")] == [0.4] * 3
