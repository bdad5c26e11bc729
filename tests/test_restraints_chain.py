"""Chain: the same as its members one after another; and docs/restraints.md, whose examples are run."""

import re
from pathlib import Path

import pytest
import torch

from sphere_plugin.errors import ConfigError
from sphere_plugin.geometry import PrincipalSpace
from sphere_plugin.restraints import SphereConfig
from sphere_plugin.restraints.chain import Chain
from sphere_plugin.restraints.prune import PruneConfig, prune_view
from sphere_plugin.restraints.rect import RectConfig, removed_share

PAGE = Path(__file__).parents[1] / "docs" / "restraints.md"
TUTORIAL = PAGE.parent / "tutorials" / "restraint.md"


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def setting():
    """W₀, W after some edits, and an update that PRUNE will act on."""
    pretrained = normal(24, 40)
    return pretrained, pretrained + normal(24, 40, seed=1), 4 * normal(24, 40, seed=2)


MEMBERS = {
    "rect": (RectConfig(),),
    "rect, sphere": (RectConfig(), SphereConfig()),
    "prune, sphere": (PruneConfig(), SphereConfig(basis="pretrained")),
    "all": (RectConfig(0.6), PruneConfig(2), SphereConfig(eta=0.3, alpha=1.0)),
    "sphere first": (SphereConfig(), RectConfig()),
}


@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS.keys())
def test_a_chain_is_its_members_one_after_another(members, setting):
    pretrained, weight, delta = setting
    passed, ranks = delta, []
    for member in members:
        step = member.bind(pretrained)(weight, passed)
        passed = step.delta
        ranks.append(step.rank)
    result = Chain(members).bind(pretrained)(weight, delta)
    assert torch.equal(result.delta, passed)
    assert result.rank == max(ranks)
    assert result.removed_share == removed_share(delta, passed)


def test_the_share_is_of_the_whole_chain_and_the_rank_is_spheres(setting):
    _, weight, delta = setting
    result = Chain((RectConfig(), SphereConfig())).bind(weight)(weight, delta)
    first = RectConfig().bind(weight)(weight, delta)
    second = SphereConfig().bind(weight)(weight, first.delta)
    assert result.rank == second.rank == PrincipalSpace.fit(weight).rank > 0
    together = 1 - (1 - first.removed_share) * (1 - second.removed_share)
    assert result.removed_share == pytest.approx(together, abs=1e-5)


def test_sphere_last_keeps_its_promise(setting):
    _, weight, delta = setting
    basis = PrincipalSpace.fit(weight).basis
    last = Chain((RectConfig(), PruneConfig(), SphereConfig(alpha=1.0))).bind(weight)(weight, delta).delta
    first = Chain((SphereConfig(alpha=1.0), RectConfig())).bind(weight)(weight, delta).delta
    assert float((last @ basis).norm() / last.norm()) < 1e-5
    assert float((first @ basis).norm() / first.norm()) > 0.1


def test_prune_then_sphere_is_the_authors_view_after_one_update(setting):
    pretrained, _, delta = setting
    chain = Chain((PruneConfig(), SphereConfig(alpha=0.8, basis="pretrained"))).bind(pretrained)
    compressed = prune_view(pretrained, pretrained + delta) - pretrained
    space = PrincipalSpace.fit(pretrained)
    expected = compressed - 0.8 * compressed @ space.basis @ space.basis.T
    torch.testing.assert_close(chain(pretrained, delta).delta, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_chain_and_members_that_hold_nothing_back_change_no_bit(setting):
    pretrained, weight, delta = setting
    for members in ((), (RectConfig(1.0), SphereConfig(alpha=0.0)), [PruneConfig()], (Chain((Chain(()),)),)):
        small = 1e-3 * delta if members and isinstance(members[0], PruneConfig) else delta
        result = Chain(members).bind(pretrained)(pretrained if small is not delta else weight, small)
        assert torch.equal(result.delta, small)
        assert (result.removed_share, result.rank) == (0.0, 0)


def test_chains_nest_compare_and_keep_half_precision(setting):
    pretrained, weight, delta = (tensor.bfloat16() for tensor in setting)
    flat = Chain([RectConfig(), PruneConfig(), SphereConfig()])
    nested = Chain((Chain((RectConfig(), PruneConfig())), SphereConfig()))
    found = flat.bind(pretrained)(weight, delta)
    assert found.delta.dtype == torch.bfloat16
    assert torch.equal(found.delta, nested.bind(pretrained)(weight, delta).delta)
    assert flat == Chain((RectConfig(), PruneConfig(), SphereConfig())) and hash(flat)
    assert flat != nested


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ((RectConfig(), "sphere"), r"members\[1\]: got 'sphere', expected a configured restraint"),
        ((RectConfig,), r"members\[0\]: got <class .*RectConfig'>, .*with the parentheses"),
        (RectConfig(), r"members: got RectConfig\(keep=0.4\), expected a sequence"),
        (None, "members: got None, expected a sequence"),
    ],
)
def test_what_is_not_a_restraint_is_refused(members, said):
    with pytest.raises(ConfigError, match=said):
        Chain(members)


def test_the_page_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert 0.0 < names["result"].removed_share < 1.0 and names["result"].rank > 0
    assert names["view"].shape == (64, 128)


def test_the_tutorial_s_restraint_caps():
    example = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names = {}
    exec(compile(example, str(TUTORIAL), "exec"), names)
    cap, weight, delta = names["NormCap"], normal(8, 9), normal(8, 9, seed=1)
    capped = cap(0.05).bind(weight)(weight, delta)
    assert float(capped.delta.norm()) == pytest.approx(0.05 * float(weight.norm()), rel=1e-5)
    assert capped.removed_share == pytest.approx(removed_share(delta, capped.delta), abs=1e-6)
    chained = Chain((cap(0.05), SphereConfig())).bind(weight)(weight, delta)
    assert float(chained.delta.norm()) <= float(capped.delta.norm())


def test_the_page_names_every_default_as_the_code_has_it():
    text = PAGE.read_text(encoding="utf-8")
    assert f"RectConfig(keep={RectConfig().keep})" in text
    sphere = SphereConfig()
    assert f'SphereConfig(eta={sphere.eta}, alpha={sphere.alpha}, basis="{sphere.basis}")' in text
