"""`integrations` of a job: honoured and echoed where the service can, refused with what is missing where it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import SecretStr

from service.app import build_app
from service.platform import Platform
from tests.api.conftest import BASE

WANDB: Any = {"type": "wandb", "wandb": {"project": "faq", "tags": ["a", "b"]}}


def test_an_integration_is_refused_until_the_service_has_what_it_needs(
    project_client: OpenAI, training_file: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, integrations=[WANDB])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "integrations.0")
    assert re.search(r"install 'tunesmith\[wandb\]'|set TUNESMITH_WANDB_API_KEY", caught.value.message)
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, integrations=[])
    assert job.integrations is None


async def test_an_integration_is_echoed_and_kept(
    platform: Platform, project_client: OpenAI, training_file: str
) -> None:
    pytest.importorskip("wandb")
    able = platform.settings.model_copy(update={"wandb_api_key": SecretStr("k" * 40)})
    transport = httpx2.ASGITransport(build_app(replace(platform, settings=able)))
    async with AsyncOpenAI(
        base_url="http://in.process/v1",
        api_key=project_client.api_key,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as inside:
        made = await inside.fine_tuning.jobs.create(model=BASE, training_file=training_file, integrations=[WANDB])
        with pytest.raises(openai.BadRequestError) as twice:
            await inside.fine_tuning.jobs.create(model=BASE, training_file=training_file, integrations=[WANDB, WANDB])
        assert twice.value.param == "integrations"
    for job in (made, project_client.fine_tuning.jobs.retrieve(made.id)):
        assert job.integrations is not None
        (one,) = job.integrations
        assert (one.type, one.wandb.project, one.wandb.tags) == ("wandb", "faq", ["a", "b"])
        assert (one.wandb.name, one.wandb.entity) == (None, None)
