"""Loading of intact checkpoints."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.files import change_shard, copy_checkpoint, stored_tensors
from tests.support.golden_files import NAMES, checkpoint, generation_cases, generation_options
from twotower_spec import ArgumentError, CheckpointError, TwoTowerConfig, TwoTowerModel
from twotower_spec.towers.backbone import Backbone
from twotower_spec.towers.layers import MixtureOfExperts

DTYPES = ["float32", "bfloat16", "float16", "float64"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_the_stored_one_in_the_wanted_dtype(name: str, dtype: str) -> None:
    model = TwoTowerModel.from_pretrained(checkpoint(name), dtype=dtype)
    stored = stored_tensors(checkpoint(name))
    loaded = dict(model.checkpoint_tensors())
    assert loaded.keys() == stored.keys()
    assert [n for n, tensor in loaded.items() if not torch.equal(tensor, stored[n].to(tensor.dtype))] == []
    assert loaded["context_tower.embeddings.weight"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("name", "dtype"), [("T1", torch.float32), ("T2", torch.bfloat16)])
def test_dtype_is_the_stored_one_when_none_is_asked_for(name: str, dtype: torch.dtype) -> None:
    model = TwoTowerModel.from_pretrained(checkpoint(name))
    assert model.dtype == dtype
    assert dict(model.checkpoint_tensors())["lm_head.weight"].dtype == dtype


def test_decay_rates_and_router_stay_float32_in_a_bfloat16_model() -> None:
    loaded = dict(TwoTowerModel.from_pretrained(checkpoint("T2"), dtype="bfloat16").checkpoint_tensors())
    precise = ("A_log", "dt_bias", "gate.weight", "e_score_correction_bias")
    assert {tensor.dtype for name, tensor in loaded.items() if name.endswith(precise)} == {torch.float32}


def test_a_torch_dtype_is_as_good_as_its_name() -> None:
    assert TwoTowerModel.from_pretrained(checkpoint("T1"), dtype=torch.float64).dtype == torch.float64


def test_unknown_dtype_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ArgumentError, match=r"'int8' is not allowed; give one of float32"):
        TwoTowerModel.from_pretrained(checkpoint("T1"), dtype="int8")


def test_unknown_choice_of_towers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'none' is not allowed; give 'both', 'context' or 'denoiser'"):
        TwoTowerModel.from_pretrained(checkpoint("T1"), towers="none")  # type: ignore[arg-type]


def context_only(name: str) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(checkpoint(name), towers="context", dtype="float32")


@pytest.mark.parametrize("name", NAMES)
def test_context_alone_holds_only_the_tensors_of_the_context_tower(name: str) -> None:
    model = context_only(name)
    assert not model.has_denoiser
    wanted = {n for n in stored_tensors(checkpoint(name)) if n.startswith(("context_tower.", "context_lm_head."))}
    assert {n for n, _ in model.checkpoint_tensors()} == wanted


@pytest.mark.parametrize("name", NAMES)
def test_context_alone_takes_less_than_half_of_the_memory(name: str) -> None:
    def size(model: TwoTowerModel) -> int:
        return sum(parameter.nbytes for parameter in model.parameters())

    assert size(context_only(name)) < 0.5 * size(TwoTowerModel.from_pretrained(checkpoint(name), dtype="float32"))


def test_context_alone_does_not_read_tensors_of_the_denoiser(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    change_shard(directory / "model.safetensors", lm_head__weight=torch.zeros(3, 17))
    assert TwoTowerModel.from_pretrained(directory, towers="context").dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"misshaped: lm_head\.weight"):
        TwoTowerModel.from_pretrained(directory)


def test_context_alone_generates_autoregressively_as_the_golden_run() -> None:
    case = next(c for c in generation_cases("T1") if c["mode"] == "generate_ar")
    result = context_only("T1").generate_ar([case["prompt"]], **generation_options(case))
    assert result.sequences == [case["output"]]


@pytest.mark.parametrize("mode", ["generate_mask_diffusion", "generate_mock_ar"])
def test_context_alone_refuses_the_other_modes_and_names_the_remedy(mode: str) -> None:
    with pytest.raises(ArgumentError, match='load it with towers="both"'):
        getattr(context_only("T1"), mode)([[7, 9, 11]], max_new_tokens=3)


def test_context_alone_cannot_be_saved_and_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match='towers="both"'):
        context_only("T1").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_alone_holds_only_its_own_tensors(name: str) -> None:
    model = TwoTowerModel.from_pretrained(checkpoint(name), towers="denoiser", dtype="float32")
    stored = stored_tensors(checkpoint(name))
    loaded = dict(model.checkpoint_tensors())
    assert loaded.keys() == {n for n in stored if not n.startswith(("context_tower.", "context_lm_head."))}
    assert all(torch.equal(tensor, stored[n].to(tensor.dtype)) for n, tensor in loaded.items())


def test_denoiser_alone_does_not_read_tensors_of_the_context_tower(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    change_shard(directory / "model.safetensors", context_lm_head__weight=torch.zeros(3, 17))
    assert TwoTowerModel.from_pretrained(directory, towers="denoiser").has_denoiser
    with pytest.raises(CheckpointError, match=r"misshaped: context_lm_head\.weight"):
        TwoTowerModel.from_pretrained(directory)


@pytest.mark.parametrize("mode", ["generate_ar", "generate_mask_diffusion", "generate_self_speculative"])
def test_denoiser_alone_refuses_to_generate_and_names_the_remedy(mode: str) -> None:
    model = TwoTowerModel.from_pretrained(checkpoint("T1"), towers="denoiser")
    with pytest.raises(ArgumentError, match='towers="denoiser" and has no context tower; load it with towers="both"'):
        getattr(model, mode)([[7, 9, 11]], max_new_tokens=3)


def test_a_denoiser_of_fewer_experts_per_token_takes_the_best_ones_and_the_context_tower_all(tmp_path: Path) -> None:
    fewer = TwoTowerModel.from_pretrained(checkpoint("T2"), dtype="float64", denoiser_experts_per_token=1)
    whole = TwoTowerModel.from_pretrained(checkpoint("T2"), dtype="float64")

    def routed(tower: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
        mixer = next(layer.mixer for layer in tower.layers if isinstance(layer.mixer, MixtureOfExperts))
        return mixer.route(torch.linspace(-1, 1, 5 * whole.config.hidden_size, dtype=torch.float64).view(5, -1))

    assert routed(fewer.context)[0].shape == routed(whole.denoiser)[0].shape == (5, 3)
    ids, weights = routed(fewer.denoiser)
    assert ids.shape == (5, 1) and (routed(whole.denoiser)[0] == ids).any(-1).all()
    # The weights of a token are divided by their sum, here one.
    assert whole.config.norm_topk_prob and torch.all((weights - whole.config.routed_scaling_factor).abs() < 1e-9)
    fewer.save_pretrained(tmp_path)
    assert TwoTowerConfig.from_pretrained(tmp_path) == whole.config


def test_more_experts_per_token_than_the_checkpoint_has_are_refused() -> None:
    with pytest.raises(ArgumentError, match="experts_per_token 4 is not allowed; give an integer from 1 to 3"):
        TwoTowerModel.from_pretrained(checkpoint("T2"), denoiser_experts_per_token=4)


class _LeavesAMark:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def write_dangerous_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(_LeavesAMark(mark)))


def test_pickles_beside_the_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, mark = copy_checkpoint("T2", tmp_path), tmp_path / "mark"
    for file in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        write_dangerous_pickle(directory / file, mark)

    def forbidden(*_args: object, **_options: object) -> None:
        raise AssertionError("something was unpickled")

    for module, function in [(torch, "load"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, function, forbidden)
    TwoTowerModel.from_pretrained(directory)
    assert not mark.exists()


def test_weights_as_pickle_alone_are_refused_unread(tmp_path: Path) -> None:
    directory, mark = copy_checkpoint("T1", tmp_path), tmp_path / "mark"
    (directory / "model.safetensors").unlink()
    write_dangerous_pickle(directory / "pytorch_model.bin", mark)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*only safetensors.*convert"):
        TwoTowerModel.from_pretrained(directory)
    assert not mark.exists()
