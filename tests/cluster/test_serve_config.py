"""The Serve config of `deploy/` on a cluster that somebody else started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import yaml
from openai import OpenAI
from ray.cluster_utils import Cluster

from tests.cluster.conftest import add_base, await_value, cluster_settings, free_port
from tests.shared import MODELS

pytestmark = pytest.mark.long

CONFIG = Path(__file__).parents[2] / "deploy" / "serve.yaml"


def test_the_serve_config_runs_the_whole_service(tmp_path: Path, cluster: Cluster) -> None:
    home, port = tmp_path / "home", free_port()
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    settings = cluster_settings(home).model_dump(mode="json", exclude={"port", "ray_address"})
    config["applications"][0]["args"] = {name: value for name, value in settings.items() if value is not None}
    mine = tmp_path / "serve.yaml"
    mine.write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).with_name("serve"))
    dashboard = f"http://{cluster.head_node.webui_url}"
    subprocess.run([serve, "deploy", "--address", dashboard, str(mine)], check=True, timeout=60)

    def is_ready() -> bool:
        try:
            return httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    await_value(is_ready, "the gateway to be ready")
    key = (home / "admin.key").read_text().strip()
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=2) as client:
        add_base(client, "stories", str(MODELS / "stories260K"))
        assert client.completions.create(model="stories", prompt="Once", max_tokens=4).choices[0].text
