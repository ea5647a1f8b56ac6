"""The benchmark of a training beside other work: who runs when. It measures nothing."""

from types import SimpleNamespace

from maintenance.benchmarks import company


def test_every_second_step_has_company_that_ends_with_it():
    steps, there, others = company.InCompany(), [], []
    try:
        for number in range(4):
            state = SimpleNamespace(global_step=number)
            steps.on_step_begin(None, state, None)
            others.append(steps.other)
            there.append(steps.other is not None and steps.other.poll() is None)
            steps.on_step_end(None, state, None)
    finally:
        steps.leave()
    assert there == [False, True, False, True]
    assert len(steps.alone_s) == len(steps.beside_s) == 2
    assert all(other.poll() is not None for other in others if other)


def test_both_ways_of_waiting_are_measured():
    tasks = company.company_tasks(3)
    assert [task.settings["spins"] for task in tasks] == [300_000, 1000]
    assert {task.part for task in tasks} == {"company"}
