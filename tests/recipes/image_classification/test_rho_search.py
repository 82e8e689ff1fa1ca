def test_rho_is_searched_on_held_out_images_alone(commands):
    for arguments in ((), ("--digits",)):
        assert all(run.hold_out for run in commands("rho_search", *arguments))
