"""Cells that cannot be used are named before anything is generated; the matrix knows its policy and grows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tso_fast.answering import ask
from tso_fast.config.settings import CellConfig, GenerateConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows
from tso_fast.matrix import ModelMatrix, check_fits, open_cell
from tso_fast.models.load import load_model, load_tokenizer
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.types import HUMAN, Candidates, Message, Prompt, Response

NAMES = ("s.v1", "s.v2", "m.v1", "m.v2")


def cells(folder: Path, *names: str, **fields: Any) -> list[CellConfig]:
    return [CellConfig(path=str(folder / name), version_rank=int(name[-1]), **fields) for name in names or NAMES]


@pytest.fixture
def copied(tiny_matrix: Path, tmp_path: Path) -> Path:
    """A cell to damage."""
    return Path(shutil.copytree(tiny_matrix / "s.v1", tmp_path / "cell.v1"))


def refusal(*configs: CellConfig, policy: str | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        ModelMatrix(configs, policy, **options)
    return str(caught.value)


# ---- cells that cannot be used


def test_a_cell_that_is_no_folder(copied: Path) -> None:
    gone = str(copied / "gone")
    said = refusal(CellConfig(path=str(copied)), CellConfig(path=gone))
    assert said == f"cells[1]: path {gone!r} is no folder; expected a local Hugging Face model or a LoRA adapter"


def test_a_cell_without_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    assert f"cells[0]: {copied} has no config.json; expected" in refusal(CellConfig(path=str(copied)))


def test_a_cell_with_a_broken_config(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    assert f"{copied}: config.json cannot be read" in refusal(CellConfig(path=str(copied)))


def test_a_cell_without_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    said = refusal(CellConfig(path=str(copied)))
    assert said == f"cells[0]: {copied} has no *.safetensors weights; expected config.json and *.safetensors"


def test_a_cell_whose_weights_only_a_server_has(copied: Path, tiny_matrix: Path) -> None:
    (copied / "model.safetensors").unlink()
    there = {"path": str(copied), "url": "http://127.0.0.1:1/v1"}
    assert "cells[0]: size_b is missing" in refusal(CellConfig(**there))
    one, other = (open_cell(CellConfig(**there, size_b=70, served_name=name)) for name in ("big", "bigger"))
    assert (one.size_b, one.has_weights) == (70, False)
    assert one.weight_hash != other.weight_hash
    assert open_cell(CellConfig(path=str(tiny_matrix / "s.v1"), url="http://127.0.0.1:1/v1")).has_weights
    matrix = ModelMatrix([CellConfig(**there, size_b=70), *cells(tiny_matrix, "s.v1")])
    assert matrix.policy.name == "s.v1"
    with pytest.raises(InputError, match=r"generator hf: cell 'cell.v1' has no weights in .*, only its server has"):
        ask(one, GenerateConfig(prompts="-", output="-", cells=[], generator="hf"))


def test_a_cell_with_pickled_weights_only(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert "it has pickled *.bin weights: save them with safe_serialization" in refusal(CellConfig(path=str(copied)))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_cell_with_corrupt_weights(copied: Path, damage: str) -> None:
    file = copied / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "text": b"weights" * 99, "empty": b""}[damage])
    assert f"cells[0]: {file} is no readable safetensors file: " in refusal(CellConfig(path=str(copied)))


def test_a_cell_with_a_part_of_its_weights(copied: Path) -> None:
    """transformers would fill in random ones and go on."""
    file = copied / "model.safetensors"
    weights = load_file(file)
    removed = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    options: dict[str, Any] = {"dtype": "float32", "attn_implementation": "sdpa", "device": "cpu"}
    with pytest.raises(InputError, match=r"1 of the model's weights are not in .*model.layers.0.mlp.up_proj.weight"):
        load_model(copied, **options)
    save_file({**weights, "model.layers.0.mlp.up_proj.weight": removed}, file, metadata={"format": "pt"})
    load_model(copied, **options)


def test_a_cell_without_a_tokenizer(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert f"{copied}: no tokenizer can be loaded from here" in refusal(CellConfig(path=str(copied)))


def test_a_tokenizer_without_an_end(copied: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copied)
    assert f"{copied}: the tokenizer has no eos_token" in refusal(CellConfig(path=str(copied)))


def test_a_cell_with_another_vocabulary(copied: Path, tiny_matrix: Path) -> None:
    texts = [("zebras graze", "quietly")] * 50
    make_tokenizer(texts, Recipe(seed=1, vocab_size=130)).save_pretrained(copied)
    said = refusal(*cells(tiny_matrix), CellConfig(path=str(copied)))
    assert f"cells[4]: {copied} has another vocabulary (" in said
    assert f"than {tiny_matrix / 'm.v2'} (" in said
    assert "All cells need the policy's tokenizer" in said


def test_a_cell_with_fewer_embeddings_than_tokens(copied: Path, tiny_matrix: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied)
    tokens = len(AutoTokenizer.from_pretrained(copied))
    model.resize_token_embeddings(tokens - 1)
    model.save_pretrained(copied)
    said = refusal(*cells(tiny_matrix), CellConfig(path=str(copied)))
    assert (
        said
        == f"cells[4]: {copied} has embeddings for {tokens - 1} tokens, but the tokenizer has ids up to {tokens - 1}"
    )
    model.resize_token_embeddings(tokens + 5)  # padded to a round number, as many models are
    model.save_pretrained(copied)
    ModelMatrix([*cells(tiny_matrix), CellConfig(path=str(copied))])


def test_names(tiny_matrix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = cells(tiny_matrix, "s.v1", "s.v1")
    assert refusal(*twice) == "cells: the name 's.v1' is given twice; set distinct names"
    for name in (HUMAN, "a/b", " ", "a\nb", "a\u202eb"):
        assert refusal(*cells(tiny_matrix, "s.v1", name=name)).startswith(
            f"cells[0]: got a cell named {name!r}; expected"
        )
    assert "the name 'tso-2' will be that of a trained" in refusal(
        *cells(tiny_matrix, "s.v1", name="tso-2"), reserved=["tso-1", "tso-2"]
    )
    assert refusal() == "cells: got none, expected at least one {path: ...}"
    monkeypatch.chdir(tiny_matrix / "s.v1")
    assert open_cell(CellConfig(path=".")).name == "s.v1"
    assert open_cell(CellConfig(path="../m.v1/")).name == "m.v1"


# ---- the policy, sizes and versions


def test_size_is_counted_and_the_hash_is_of_the_weights(tiny_matrix: Path, copied: Path) -> None:
    counted = sum(t.numel() for t in load_file(tiny_matrix / "s.v1/model.safetensors").values())
    cell, same = open_cell(CellConfig(path=str(tiny_matrix / "s.v1"))), open_cell(CellConfig(path=str(copied)))
    assert cell.size_b == counted / 1e9
    assert cell.context == 512
    assert open_cell(CellConfig(path=str(copied), size_b=7, name="seven")).size_b == 7
    other = open_cell(CellConfig(path=str(tiny_matrix / "s.v2")))
    assert cell.weight_hash == same.weight_hash != other.weight_hash


def test_the_policy_is_the_newest_of_the_largest_unless_named(tiny_matrix: Path) -> None:
    assert ModelMatrix(cells(tiny_matrix)).policy.name == "m.v2"
    assert ModelMatrix(cells(tiny_matrix, "m.v1", "s.v2")).policy.name == "m.v1"
    small_but_said_to_be_large = [*cells(tiny_matrix, "s.v1", size_b=70.0), *cells(tiny_matrix, "m.v2")]
    assert ModelMatrix(small_but_said_to_be_large).policy.name == "s.v1"
    assert ModelMatrix(cells(tiny_matrix), "s.v1").policy.name == "s.v1"
    said = refusal(*cells(tiny_matrix), policy="m.v9")
    assert said == "policy: got 'm.v9', expected one of the cells s.v1, s.v2, m.v1, m.v2"


@pytest.mark.parametrize(
    ("max_versions", "expected"), [(0, ["tso-1", "tso-2", "tso-3"]), (1, ["tso-3"]), (2, ["tso-2", "tso-3"])]
)
def test_trained_versions_join_and_the_oldest_of_them_leave(
    tiny_matrix: Path, max_versions: int, expected: list[str]
) -> None:
    matrix = ModelMatrix(cells(tiny_matrix))
    for t in (1, 2, 3):
        matrix.add_version(tiny_matrix / "m.v2", f"tso-{t}", max_versions)
    assert [cell.name for cell in matrix.cells] == [*NAMES, *expected]
    newest = matrix.cells[-1]
    assert newest is matrix.policy
    assert newest.size_b == matrix.initial.size_b
    assert newest.version_rank == 5
    assert matrix.initial.name == "m.v2"


# ---- what fits


def item(prompt: Any = "2 + 3?", *responses: Response) -> Candidates:
    return Candidates(prompt=Prompt(id="q", prompt=prompt, where="p.jsonl:4"), responses=responses)


@pytest.fixture(scope="module")
def tokenizer(tiny_matrix: Path) -> Any:
    return load_tokenizer(tiny_matrix / "s.v1")


LONG = "Sam has 2 pears. " * 20


@pytest.mark.parametrize(
    ("bad_item", "message"),
    [
        (
            item(LONG),
            r"field 'prompt' has \d+ tokens; with max_completion_length 16 that exceeds the context of 64; "
            r"expected at most 48",
        ),
        (
            item("2 + 3?", Response(model=HUMAN, text=LONG)),
            r"field 'human_response' has \d+ tokens; with the prompt's"
            r" \d+ that exceeds the context of 64",
        ),
        (item("2 + 3?", Response(model="old", text=LONG)), r"field 'responses\[old\]' has \d+ tokens"),
        (item("2 + 3?", Response(model="old", text="", token_ids=(3,) * 64)), r"'responses\[old\]' has 64 tokens"),
    ],
    ids=["prompt", "human_response", "response", "token_ids"],
)
def test_too_long_raises_or_is_skipped(tokenizer: Any, bad_item: Candidates, message: str) -> None:
    with pytest.raises(InputError, match=r"p\.jsonl:4: .*" + message):
        check_fits([item(), bad_item], tokenizer, 64, 16, BadRows())
    bad = BadRows("skip")
    assert check_fits([item(), bad_item, item("why?")], tokenizer, 64, 16, bad) == [item(), item("why?")]
    assert [row["row"]["id"] for row in bad.rows] == ["q"]
    assert check_fits([bad_item], tokenizer, None, 16, BadRows()) == [bad_item]  # no limit known
    with pytest.raises(InputError, match=r"prompts: none of 1 can be used; the last: p.jsonl:4: field"):
        check_fits([bad_item], tokenizer, 64, 16, BadRows("skip"))


def test_a_prompt_that_just_fits(tokenizer: Any) -> None:
    length = len(tokenizer("<bos>2 + 3?\n", add_special_tokens=False)["input_ids"])
    assert check_fits([item()], tokenizer, length + 16, 16, BadRows()) == [item()]
    with pytest.raises(InputError, match=f"has {length} tokens"):
        check_fits([item()], tokenizer, length + 15, 16, BadRows())


CONVERSATION = (
    Message(role="user", content="2 + 3?"),
    Message(role="assistant", content="5"),
    Message(role="user", content="+ 1?"),
)


def test_a_conversation_needs_a_chat_template(tiny_matrix: Path, tokenizer: Any) -> None:
    assert check_fits([item(CONVERSATION)], tokenizer, 64, 16, BadRows())
    bare = load_tokenizer(tiny_matrix / "s.v1")
    bare.chat_template = None
    assert check_fits([item()], bare, 64, 16, BadRows())
    with pytest.raises(InputError, match=r"p\.jsonl:4: field 'prompt' is a conversation, but the tokenizer has"):
        check_fits([item(CONVERSATION)], bare, 64, 16, BadRows())


def test_a_conversation_that_the_template_refuses(tiny_matrix: Path) -> None:
    strict = load_tokenizer(tiny_matrix / "s.v1")
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    spoken = (Message(role="system", content="Be brief."), Message(role="user", content="2 + 3?"))
    assert check_fits([item(CONVERSATION)], strict, 64, 16, BadRows())
    with pytest.raises(InputError, match=r"p.jsonl:4: field 'prompt' is refused by the chat template: System role"):
        check_fits([item(spoken)], strict, 64, 16, BadRows())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[0]['content'].nothing() }}", "has no attribute 'nothing'"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_raises_anything(tiny_matrix: Path, template: str, reason: str) -> None:
    broken = load_tokenizer(tiny_matrix / "s.v1")
    broken.chat_template = template
    with pytest.raises(InputError, match=rf"p.jsonl:4: field 'prompt' is refused by the chat template: .*{reason}"):
        check_fits([item()], broken, 64, 16, BadRows())


def test_a_cell_named_policy_is_the_policy_or_no_judge_can_be_asked(tiny_matrix: Path) -> None:
    old, new = cells(tiny_matrix, "s.v1", "s.v2")
    old.name = "policy"
    assert ModelMatrix([old, new], "policy").named.keys() == {"policy", "s.v2"}
    with pytest.raises(InputError, match=r"cells: got a cell named 'policy' \(.*s.v1\), which is what judges call"):
        _ = ModelMatrix([old, new], "s.v2").named


def test_no_prompt_fits_beside_such_long_responses(tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match=r"^max_completion_length: got 108, but the context of 64 tokens holds the pro"
    ):
        check_fits([item()], tokenizer, 64, 108, BadRows("skip"))


def test_the_context_of_a_matrix_is_its_smallest(copied: Path, tiny_matrix: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    assert ModelMatrix(cells(tiny_matrix)).context == 512
    assert ModelMatrix([*cells(tiny_matrix), CellConfig(path=str(copied))]).context == 100


def test_token_ids_of_another_vocabulary(tokenizer: Any) -> None:
    other = Response(model="other", text="x", token_ids=(3, len(tokenizer)))
    item = Candidates(prompt=Prompt(id="q", prompt="Hello", where="p.jsonl:7"), responses=(other,))
    with pytest.raises(InputError, match=rf"p.jsonl:7: field 'responses\[other\]' has token id {len(tokenizer)}"):
        check_fits([item], tokenizer, 64, 16, BadRows())


# ---- LoRA adapters


@pytest.fixture
def adapter(tiny_matrix: Path, tmp_path: Path) -> Path:
    return make_adapter(tiny_matrix / "m.v2", tmp_path / "lora")


def test_an_adapter_is_a_cell_of_its_base(tiny_matrix: Path, adapter: Path) -> None:
    base, cell = open_cell(CellConfig(path=str(tiny_matrix / "m.v2"))), open_cell(CellConfig(path=str(adapter)))
    assert (cell.path, cell.base, cell.name, cell.lora_rank) == (adapter, tiny_matrix / "m.v2", "lora", 4)
    assert (cell.size_b, cell.context, cell.architecture) == (base.size_b, base.context, base.architecture)
    assert cell.is_adapter
    assert not base.is_adapter
    assert cell.weight_hash != base.weight_hash
    matrix = ModelMatrix([*cells(tiny_matrix), CellConfig(path=str(adapter), version_rank=3)])
    assert matrix.policy.name == "lora"


def test_full_weights_of_one_shape_share_an_architecture(tiny_matrix: Path) -> None:
    small, smaller, large = (open_cell(*cells(tiny_matrix, name)) for name in ("s.v1", "s.v2", "m.v1"))
    assert small.architecture == smaller.architecture != large.architecture


def test_what_an_adapter_does_is_in_its_hash(tiny_matrix: Path, adapter: Path, tmp_path: Path) -> None:
    def hash_of(**changes: Any) -> str:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return open_cell(CellConfig(path=str(adapter), base=str(tiny_matrix / "m.v2"))).weight_hash

    first = hash_of()
    assert hash_of(lora_alpha=99) != first
    assert hash_of(lora_alpha=8) == first
    assert hash_of(base_model_name_or_path="elsewhere") == first
    other_base = CellConfig(path=str(adapter), base=str(tiny_matrix / "m.v1"))
    assert open_cell(other_base).weight_hash != first


def test_adapters_that_cannot_be_used(tiny_matrix: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())

    def said(**changes: Any) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return refusal(CellConfig(path=str(adapter)))

    assert "of rank 4, but adapter_config.json says r 16; the two files do not belong together" in said(r=16)
    assert "is an adapter of type 'IA3'; expected LORA" in said(peft_type="IA3")
    assert "'gone', is no folder; set cells[0].base to its local folder" in said(base_model_name_or_path="gone")
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refusal(CellConfig(path=str(adapter)))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "is no readable safetensors file" in refusal(CellConfig(path=str(adapter)))
    weights.unlink()
    assert "has no adapter_model.safetensors" in refusal(CellConfig(path=str(adapter)))
    given = CellConfig(path=str(tiny_matrix / "s.v1"), base=str(tiny_matrix / "s.v2"))
    assert "holds no adapter_config.json; leave it out" in refusal(given)
