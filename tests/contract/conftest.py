import pytest

from tests.contract.fitting import CASES, METHODS, Fitted, quick, snapshot, tiny_of


@pytest.fixture(scope="session", params=CASES, ids=lambda case: "-".join(case))
def fitted(request: pytest.FixtureRequest) -> Fitted:
    name, family = request.param
    method, model = quick(METHODS[name]), tiny_of(family)
    task = method.example_task(model)
    before = snapshot(model)
    edit = method.fit(model, task)
    return Fitted(method, model, task, edit, before, snapshot(model))
