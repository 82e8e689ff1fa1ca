def test_the_hyper_parameters_are_the_paper_s(commands):
    runs = commands("table4")
    assert len(runs) == 3 * 3
    for run in runs:
        assert (run.dataset, run.model, run.lr, run.batch_size) == ("imagenet", "resnet50", 0.2, 512)
        assert (run.weight_decay, run.label_smoothing) == (1e-4, 0.1)
        assert (run.epochs, run.m) == ((200, None) if run.optimizer == "sgd" else (100, 128))
        assert run.rho == {"sgd": 0.0, "sam": 0.05, "asam": 1.0}[run.optimizer]


def test_on_digits_m_is_the_same_share_of_the_batch(commands):
    runs = commands("table4", "--digits", "--seeds", "1")
    assert [(run.optimizer, run.m) for run in runs] == [("sgd", None), ("sam", 16), ("asam", 16)]
