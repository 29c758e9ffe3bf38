"""The recipes of docs/upstreams.md: aiproxy sends what each platform's own SDK client sends."""

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import anthropic
import pytest
import yaml

from aiproxy.app import create_app
from aiproxy.config import load

PAGE = Path(__file__).parents[2] / "docs" / "upstreams.md"
RECIPES = {
    recipe["name"]: recipe
    for recipe in map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))
}
TOKEN = "sk-test-platform"
#: The newest SDKs send these keys as bearer. `x-api-key` is right for clients of every API version.
AS_BEARER = {"anthropic", "claude-on-aws"}
ASK = {"model": "claude-x", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
WORKSPACE = "example-workspace"
CLIENTS = {
    "anthropic": lambda **more: anthropic.Anthropic(api_key=TOKEN, **more),
    "foundry": lambda **more: anthropic.AnthropicFoundry(
        api_key=TOKEN, **(more or {"resource": "example-resource"})
    ),
    "foundry-entra": lambda **more: anthropic.AnthropicFoundry(
        azure_ad_token_provider=lambda: TOKEN, **(more or {"resource": "example-resource"})
    ),
    "bedrock": lambda **more: anthropic.AnthropicBedrockMantle(api_key=TOKEN, aws_region="us-east-1", **more),
    "claude-on-aws": lambda **more: anthropic.AnthropicAWS(
        api_key=TOKEN, aws_region="us-east-1", workspace_id=WORKSPACE, **more
    ),
    "google-cloud": lambda **more: anthropic.AnthropicGoogleCloud(
        project="example-project",
        location="global",
        workspace_id=WORKSPACE,
        token_provider=lambda: TOKEN,
        **more,
    ),
    "relay": lambda base_url="https://relay.example": anthropic.Anthropic(
        auth_token=TOKEN, base_url=base_url
    ),
}


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_each_recipe_has_its_client():
    assert set(RECIPES) == set(CLIENTS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_address_is_the_sdk_s(name):
    assert RECIPES[name]["base_url"] == str(CLIENTS[name]().base_url).rstrip("/")


@pytest.mark.parametrize("name", RECIPES)
def test_aiproxy_sends_what_the_sdk_sends(name, upstream, tmp_path):
    fake = upstream()
    recipe = RECIPES[name]
    base_url = fake.url + urlsplit(recipe["base_url"]).path
    CLIENTS[name](base_url=base_url).messages.create(**ASK)

    settings = {key: value for key, value in recipe.items() if key not in ("token_command", "model_mappings")}
    file = tmp_path / "config.yaml"
    one = settings | {"base_url": base_url, "token": TOKEN}
    file.write_text(json.dumps({"upstreams": [one], "ledger": "none"}))
    client = create_app(load(file, {})).test_client()
    version = {"anthropic-version": fake.seen[0].header("anthropic-version")}
    assert client.post("/v1/messages", json=ASK, headers=version).status_code == 200

    sdk, ours = fake.seen
    assert (ours.method, ours.target) == (sdk.method, sdk.target)
    assert json.loads(ours.body) == json.loads(sdk.body)
    same = ["anthropic-version", "anthropic-workspace-id", "content-type"]
    assert {each: ours.header(each) for each in same} == {each: sdk.header(each) for each in same}
    ours_key, sdk_key = ((each.header("x-api-key"), each.header("authorization")) for each in (ours, sdk))
    if name in AS_BEARER:
        assert (ours_key, sdk_key) == ((TOKEN, None), (None, f"Bearer {TOKEN}"))
    else:
        assert ours_key == sdk_key


def test_the_recipes_load(tmp_path):
    names = set(re.findall(r"\$\{(\w+)\}", PAGE.read_text()))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"upstreams": list(RECIPES.values()), "ledger": "none"}))
    config = load(file, {each: f"sk-test-{each}" for each in names})
    assert [each.name for each in config.upstreams] == list(RECIPES)
