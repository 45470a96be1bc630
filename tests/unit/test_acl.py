"""Access control lists as values: what a user may, what is added, what is taken back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotlun.backends.acl import (
    MASK,
    OWNER,
    READ,
    SEARCH,
    WRITE,
    Acl,
    Key,
    allows,
    extended,
    merged,
    user,
)

OWNING_GROUP: Key = (4, 0xFFFFFFFF)
GROUP_7: Key = (8, 7)
OTHERS: Key = (32, 0xFFFFFFFF)
US = user(1000)


def mode(owner: int, group: int, others: int) -> Acl:
    return {OWNER: owner, OWNING_GROUP: group, OTHERS: others}


permissions = st.integers(0, 7)
names: st.SearchStrategy[Acl] = st.dictionaries(
    st.sampled_from([user(1), user(2), US, GROUP_7]), permissions, max_size=4
)


@st.composite
def acls(draw: st.DrawFn) -> Acl:
    """A list as the kernel takes it: named entries only with a mask."""
    acl = mode(draw(permissions), draw(permissions), draw(permissions)) | draw(names)
    if len(acl) > 3 or draw(st.booleans()):
        acl[MASK] = draw(permissions)
    return acl


def effective(acl: Acl) -> Acl:
    """Whom -> what the list really gives."""
    mask = acl.get(MASK, 7)
    return {
        key: value if key in (OWNER, OTHERS) else value & mask
        for key, value in acl.items()
        if key != MASK
    }


def test_who_may_what() -> None:
    """The owner by its own entry, a named user by its entry and the mask, else everybody."""
    assert allows(mode(6, 0, 0), OWNER, READ | WRITE)
    assert not allows(mode(4, 6, 6), OWNER, WRITE)
    assert allows(mode(0, 7, 5), US, READ | SEARCH)
    assert not allows(mode(7, 0, 4), US, READ | WRITE)
    named = {**mode(7, 7, 7), US: READ | WRITE, MASK: READ}
    assert allows(named, US, READ)
    assert not allows(named, US, WRITE)


def test_a_group_may_be_the_users() -> None:
    """What everybody else may is not enough where a group may less."""
    assert not allows(mode(6, 0, 4), US, READ)
    assert not allows({**mode(6, 4, 4), GROUP_7: 0, MASK: 7}, US, READ)


@given(acls(), st.sampled_from([US, user(3), OWNER]), permissions)
def test_what_is_added(acl: Acl, who: Key, wanted: int) -> None:
    """The user has what it needs; nobody else has more or less than before."""
    result = extended(acl, {who: wanted})
    assert not wanted & ~effective(result)[who]
    others = {key: value for key, value in effective(result).items() if key != who}
    assert others == {key: value for key, value in effective(acl).items() if key != who}
    assert effective(result)[who] & ~wanted & ~effective(acl).get(who, 0) == 0


@given(acls(), st.sampled_from([US, user(3), OWNER]), permissions)
def test_what_is_taken_back(acl: Acl, who: Key, wanted: int) -> None:
    """Without changes by others the original is what it was."""
    written = extended(acl, {who: wanted})
    assert merged(acl, written, written) == acl


@given(acls(), permissions, permissions)
def test_what_others_change_meanwhile_stays(acl: Acl, wanted: int, theirs: int) -> None:
    """Somebody else's entry survives our taking ours back."""
    written = extended(acl, {US: wanted})
    newcomer = user(99)
    result = merged(acl, written, {**written, newcomer: theirs, OTHERS: theirs})
    assert result[newcomer] == theirs
    assert result[OTHERS] == theirs
    assert result.get(US) == acl.get(US)
