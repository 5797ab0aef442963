"""MixRecord: rows are permuted, cut, padded and joined without losing or inventing a mixed step."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngrpo_ops import MixRecord
from ngrpo_ops.record import SparseRecord
from ngrpo_ops.testing import generators

BY_ROW = ("noise_scale", "noise_seed", "row_ids")


@st.composite
def records(
    draw: st.DrawFn, k: int | None = None, logprobs: bool | None = None, noise: bool | None = None
) -> MixRecord:
    generator = draw(generators)
    b, t, k = draw(st.integers(1, 6)), draw(st.integers(0, 7)), k or draw(st.integers(1, 4))
    with_logprobs = draw(st.booleans()) if logprobs is None else logprobs
    of_noise = {}
    if draw(st.booleans()) if noise is None else noise:
        of_noise = {"noise_scale": torch.rand(b, generator=generator)}
        of_noise |= {name: torch.randint(9, (b,), generator=generator) for name in ("noise_seed", "row_ids")}
    return MixRecord(
        gate=torch.rand(b, t, generator=generator) < 0.3,
        ids=torch.randint(50, (b, t, k), generator=generator),
        weights=torch.rand(b, t, k, generator=generator),
        prompt_length=3,
        logprobs=-torch.rand(b, t, generator=generator) if with_logprobs else None,
        **of_noise,
    )


@given(record=records())
def test_tensors(record):
    named = record.tensors()
    optional = {name for name in ("logprobs", *BY_ROW) if getattr(record, name) is not None}
    assert set(named) == {"gate", "ids", "weights"} | optional
    assert all(value is getattr(record, name) and value.shape[0] == len(record) for name, value in named.items())
    assert record.length == record.gate.shape[1]
    rebuilt = MixRecord(**named, prompt_length=record.prompt_length)
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.tensors().values(), named.values(), strict=True))


@given(record=records(), generator=generators)
def test_rows(record, generator):
    order = torch.randperm(len(record), generator=generator)
    mask = torch.rand(len(record), generator=generator) < 0.5
    for rows in (order, mask, slice(1, None), slice(None, None, 2)):
        picked = record[rows]
        assert picked.prompt_length == record.prompt_length and picked.tensors().keys() == record.tensors().keys()
        for name, value in record.tensors().items():
            assert torch.equal(getattr(picked, name), value[rows])
    back = record[order][order.argsort()]
    assert all(torch.equal(getattr(back, name), value) for name, value in record.tensors().items())


@given(record=records(), length=st.integers(0, 10), prompt_length=st.sampled_from([None, 0, 9]))
def test_fit(record, length, prompt_length):
    if bool(record.gate[:, length:].any()):
        with pytest.raises(ValueError, match="length"):
            record.fit(length)
        return
    fitted = record.fit(length, prompt_length)
    assert fitted.length == length and len(fitted) == len(record)
    assert fitted.prompt_length == (3 if prompt_length is None else prompt_length)
    common = min(length, record.length)
    for name, value in record.tensors().items():
        grown = getattr(fitted, name)
        if name in BY_ROW:
            assert torch.equal(grown, value)
            continue
        assert grown.dtype == value.dtype and torch.equal(grown[:, :common], value[:, :common])
        assert not grown[:, common:].any()


@given(k=st.integers(1, 3), logprobs=st.booleans(), noise=st.booleans(), data=st.data())
def test_cat(k, logprobs, noise, data):
    parts = data.draw(st.lists(records(k=k, logprobs=logprobs, noise=noise), min_size=1, max_size=4))
    joined = MixRecord.cat(parts)
    assert len(joined) == sum(map(len, parts)) and joined.length == max(p.length for p in parts)
    start = 0
    for part in parts:
        rows = joined[start : start + len(part)]
        for name, value in part.tensors().items():
            if name in BY_ROW:
                assert torch.equal(getattr(rows, name), value)
                continue
            assert torch.equal(getattr(rows, name)[:, : part.length], value)
            assert not getattr(rows, name)[:, part.length :].any()
        start += len(part)


def good(**change: object) -> dict:
    tensors = {"gate": torch.zeros(2, 3).bool(), "ids": torch.zeros(2, 3, 2).long(), "weights": torch.ones(2, 3, 2)}
    return {**tensors, "prompt_length": 1, **change}


def test_to():
    assert MixRecord(**good()).to("meta").ids.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"gate": [True]}, TypeError, "gate"),
        ({"gate": torch.ones(2, 3)}, TypeError, "gate"),
        ({"gate": torch.ones(3).bool()}, ValueError, "gate"),
        ({"ids": [0]}, TypeError, "ids"),
        ({"ids": torch.zeros(2, 3, 2)}, TypeError, "ids"),
        ({"ids": torch.zeros(2, 3).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 4, 2).long()}, ValueError, "ids"),
        ({"weights": [0]}, TypeError, "weights"),
        ({"weights": torch.ones(2, 3, 3)}, ValueError, "weights"),
        ({"weights": torch.ones(2, 3, 2).long()}, TypeError, "weights"),
        ({"row_ids": torch.zeros(2).long()}, TypeError, "noise_scale"),
        ({"noise_scale": torch.ones(3), "noise_seed": torch.ones(2).long()}, ValueError, "noise_scale"),
        ({"prompt_length": -1}, ValueError, "prompt_length"),
        ({"logprobs": torch.zeros(2, 4)}, ValueError, "logprobs"),
        ({"logprobs": [0.0]}, TypeError, "logprobs"),
        ({"logprobs": torch.zeros(2, 3).long()}, TypeError, "logprobs"),
    ],
)
def test_bad_fields_are_named(change, error, name):
    with pytest.raises(error, match=name):
        MixRecord(**good(**change))


@pytest.mark.parametrize(
    "change",
    [{"prompt_length": 2}, {"ids": torch.zeros(2, 3, 1).long(), "weights": torch.ones(2, 3, 1)},
     {"logprobs": torch.zeros(2, 3)}],
)  # fmt: skip
def test_records_that_do_not_fit_together(change):
    with pytest.raises(ValueError, match="agree"):
        MixRecord.cat([MixRecord(**good()), MixRecord(**good(**change))])
    with pytest.raises(ValueError, match="records"):
        MixRecord.cat([])


def test_the_bytes_of_a_slice_are_of_the_slice_alone():
    record = MixRecord(torch.ones(64, 50).bool(), torch.ones(64, 50, 3).long(), torch.ones(64, 50, 3), prompt_length=4)
    assert len(record[:1].to_bytes()) < len(record.to_bytes()) / 16


def other_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", MixRecord(**good()).to_bytes()[:-100], MixRecord(**good()).to_bytes()[:7], b"\0" * 64, b"null",
     pickle.dumps(print), other_bytes([1]), other_bytes({}), other_bytes({"gate": 1}),
     other_bytes(good() | {"more": 1}),
     other_bytes(good() | {"ids": torch.zeros(1)}), other_bytes(good() | {"prompt_length": "1"}), 5, None],
)  # fmt: skip
def test_damaged_bytes_are_named(content):
    with pytest.raises(ValueError, match=r"^content must be what MixRecord\.to_bytes returned: "):
        MixRecord.from_bytes(content)


# One rollout's ------------------------------------------------------------------------------------------------------


def sparse() -> SparseRecord:
    ids, weights = torch.tensor([[7, 8], [9, 3]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    return SparseRecord(5, torch.tensor([1, 3]), ids, weights, torch.tensor([-0.1, -0.2, -0.3, -0.4]), (0.5, 7, 9))


def same(one: SparseRecord, other: SparseRecord) -> bool:
    tensors = ("steps", "ids", "weights", "logprobs")
    return (one.first, one.noise) == (other.first, other.noise) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_a_sparse_record_survives_its_bytes():
    assert same(SparseRecord.from_bytes(sparse().to_bytes()), sparse())
    many = SparseRecord(5, torch.arange(999), torch.ones(999, 3).long(), torch.ones(999, 3), torch.zeros(999))
    assert len(many.cut(3).to_bytes()) < len(many.to_bytes()) / 4  # of the slice alone
    for content in (b"", pickle.dumps(print), MixRecord(**good()).to_bytes(), other_bytes({"first": 1}), None):
        with pytest.raises(ValueError, match=r"^content must be what SparseRecord\.to_bytes returned: "):
            SparseRecord.from_bytes(content)


@pytest.mark.parametrize(("length", "steps"), [(0, []), (1, []), (2, [1]), (3, [1]), (4, [1, 3]), (9, [1, 3])])
def test_a_sparse_record_is_cut_with_its_tokens(length, steps):
    found = sparse().cut(length)
    assert found.steps.tolist() == steps and len(found.logprobs) == min(length, 4)
    assert torch.equal(found.ids, sparse().ids[: len(steps)]) and found.noise == sparse().noise
