"""Chat templates: ids as transformers has them, sentences for what cannot be written down, and the commands that use them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from specedge.chat import ChatError, ChatTemplate
from specedge.config import SamplingParams
from specedge.engine.engine import Engine
from specedge.net.server import Server
from specedge.text import Tokenizer
from tests.helpers import BYTES, byte_tokenizer, random_model
from tests.test_cli import end, start

SPECIAL = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "<end>"}}
TALK = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " Größe? <b>&'\"</b> "},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And \U0001f600?"},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = {
    "marked roles": "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "blocks and lines": """
    {%- if messages[0].role == "system" %}
        {%- set first = messages[0].content | trim %}
        {%- set rest = messages[1:] %}
    {%- else %}
        {%- set rest = messages %}
    {%- endif %}
{{ bos_token }}
    {% for m in rest %}
        {% if (m.role == "user") != (loop.index0 % 2 == 0) %}
            {{ raise_exception("roles must alternate") }}
        {% endif %}
        {% if loop.first and first is defined %}
[{{ first }}]
        {% endif %}
  {{ m.content }}
    {% endfor %}""",
    "generation marks": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{% endfor %}",
    "tools as JSON": "{% if tools %}{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}{{ messages | tojson }}",
    "namespace and macro": "{% macro say(m) %}{{ m.role | upper }}: {{ m.content }}{% endmacro %}{% set n = namespace(seen=0) %}"
    "{% for m in messages %}{% set n.seen = n.seen + 1 %}{{ say(m) }} {{ n.seen }}{% endfor %}{{ strftime_now('%Y') }}",
    "a variable": "{{ 'think' if enable_thinking is defined and enable_thinking else 'answer' }}{{ messages[-1].content }}{{ nothing }}",
}


def directory(path: Path, template: Any, as_file: bool = False) -> Path:
    """A model directory with a tokenizer that puts <s> before every text, and `template`."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 257)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(SPECIAL | ({} if as_file else {"chat_template": template})))
    if as_file:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", [True, False])
def test_ids_are_those_of_transformers(tmp_path: Path, name: str, as_file: bool, reply: bool) -> None:
    at = directory(tmp_path, TEMPLATES[name], as_file)
    law = PreTrainedTokenizerFast(tokenizer_file=str(at / "tokenizer.json"), bos_token="<s>", eos_token="<end>", chat_template=TEMPLATES[name])
    variables = {"tools": TOOLS, "enable_thinking": True}
    want = law.apply_chat_template(TALK, add_generation_prompt=reply, return_dict=False, **variables)
    assert Tokenizer.from_dir(at).chat(TALK, reply=reply, **variables) == want
    assert 257 not in want or "bos_token" in TEMPLATES[name]  # the tokenizer's own <s> comes from encode alone


def test_the_default_of_several(tmp_path: Path) -> None:
    at = directory(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}])
    assert ChatTemplate.from_dir(at).render(TALK) == TALK[0]["content"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no\nsystem') }}", "refuses these messages: no system"),
        ("{{ messages[9].content }}", "cannot write these messages down"),
        ("{{ 1 // 0 }}", "cannot write these messages down"),
        ("{{ messages.append(1) }}", "cannot write these messages down"),  # it may not change what it is given
        ("{{ ''.__class__.__mro__ }}", "cannot write these messages down"),  # nor look behind it
        ("{% for m in %}", "is no chat template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is no chat template"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "is no chat template"),  # Python takes 20
        ("{% include 'x' %}", "cannot write these messages down"),
        (None, "has no chat template"),
        (7, "has no chat template"),
        ([{"name": "tool_use", "template": "x"}], "has no chat template"),
        ([{"template": "x"}], "cannot be read"),
    ],
)
def test_failures_are_sentences(tmp_path: Path, template: Any, why: str) -> None:
    at = directory(tmp_path, template)
    with pytest.raises(ChatError, match=why) as e:
        Tokenizer.from_dir(at).chat(TALK)
    assert "\n" not in str(e.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    at = directory(tmp_path, "x")
    for content in (b"{", b"[]", b"\xff", b"[" * 200_000):
        (at / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ChatError, match="cannot be read"):
            Tokenizer.from_dir(at).chat(TALK)
    with pytest.raises(ChatError, match="no model directory"):
        Tokenizer(byte_tokenizer()).chat(TALK)


def test_commands(tmp_path: Path) -> None:
    """`generate --chat` answers one message, `chat` a line at a time with all that was said before; both as the target alone would."""
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:"
    target = random_model(tmp_path / "target", 3, byte_tokenizer(), vocab_size=BYTES, eos_token_id=256, max_position_embeddings=6000)
    (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    params = SamplingParams(max_tokens=8)
    with Engine.from_pretrained(target, device="cpu") as engine:
        assert engine.tokenizer is not None
        talk = [{"role": "system", "content": "hm"}, {"role": "user", "content": "a"}]
        first = engine.generate([engine.tokenizer.chat(talk)], params)[0].text
        talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "b"}]
        second = engine.generate([engine.tokenizer.chat(talk)], params)[0].text
        with Server(engine) as server:
            given = ("--server", server.address, "--no-draft", "--tokenizer", target, "--max-tokens", 8, "--system", "hm")
            one = start("edge", "generate", *given, "--chat", "--prompt", "a")
            lines = start("edge", "chat", *given)
            assert (end(one).out, (spoken := end(lines, b"a\n\nb\n")).out) == (first + "\n", first + "\n" + second + "\n")
            assert spoken.status == 0 and spoken.err.count("tokens per round") == 2
            (tmp_path / "edge.toml").write_text('system = "hm"\n')
            raw = ("edge", "generate", *given[:-2], "--prompt", "a")
            wrong, fine = end(start(*raw, "--system", "hm")), end(start(*raw, "--config", tmp_path / "edge.toml"))
            assert (wrong.status, "add --chat" in wrong.err) == (1, True) and fine.status == 0 and fine.out, "a setting is for the chats to come"
