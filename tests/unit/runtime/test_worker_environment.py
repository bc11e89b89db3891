"""What a worker finds in its environment: its device of the list, and its share of the cores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from streamproc.runtime.worker_process import measurer_environment, worker_environment
from streamproc.settings import SECRET_VARIABLES, PoolSettings, Settings


@given(workers=st.integers(1, 9), devices=st.lists(st.sampled_from(["0", "1", "GPU-8932f937", "MIG-4"]), max_size=4))
def test_devices_are_handed_out_in_turn(workers: int, devices: list[str]) -> None:
    settings = PoolSettings(workers=workers, devices=devices)
    given_to = [worker_environment(settings, it, {}).get("CUDA_VISIBLE_DEVICES") for it in range(workers)]
    assert given_to == [devices[it % len(devices)] if devices else None for it in range(workers)]


def test_without_a_list_a_worker_sees_the_devices_of_the_processor() -> None:
    assert worker_environment(PoolSettings(), 0, {"CUDA_VISIBLE_DEVICES": "2,3"})["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_what_pool_env_says_goes_over_the_list() -> None:
    settings = PoolSettings(devices=["0"], env={"CUDA_VISIBLE_DEVICES": "7"})
    assert worker_environment(settings, 0, {})["CUDA_VISIBLE_DEVICES"] == "7"


def test_the_measuring_process_sees_no_device() -> None:
    assert measurer_environment(PoolSettings(devices=["0", "1"]), {})["CUDA_VISIBLE_DEVICES"] == ""


def test_no_child_inherits_a_secret_of_our_settings() -> None:
    secrets = {
        "STREAMPROC_KAFKA__SASL_PASSWORD": "one",
        "streamproc_http__token": "two",
        "STREAMPROC_HTTP__PREDICT__TOKEN": "three",
        "STREAMPROC_SCHEMA_REGISTRY__PASSWORD": "four",
        "STREAMPROC_SCHEMA_REGISTRY__TOKEN": "five",
    }
    # What a backend reads itself is the user's business.
    others = {"STREAMPROC_KAFKA__SASL_USERNAME": "app", "HF_TOKEN": "the user's"}
    for made in (
        worker_environment(PoolSettings(), 0, secrets | others),
        measurer_environment(PoolSettings(), secrets | others),
    ):
        assert not set(secrets) & set(made)
        assert others.items() <= made.items()
    told = {"STREAMPROC_HTTP__TOKEN": "on purpose"}
    assert told.items() <= worker_environment(PoolSettings(env=told), 0, secrets).items()


def test_every_secret_of_the_settings_is_one_that_is_left_out() -> None:
    def secrets(model: type[BaseModel], place: str) -> set[str]:
        found = set()
        for name, schema in model.model_json_schema(mode="validation")["properties"].items():
            field = model.model_fields[name].annotation
            if isinstance(field, type) and issubclass(field, BaseModel):
                found |= secrets(field, f"{place}{name}__")
            elif "writeOnly" in str(schema):
                found.add(f"{place}{name}".upper())
        return found

    assert secrets(Settings, "STREAMPROC_") == SECRET_VARIABLES
