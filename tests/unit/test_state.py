"""The table of states."""

from core.jobs.state import JOB_STATES, OWNED, TERMINAL, TRANSITIONS, can_change


def test_table_names_every_state_and_only_those() -> None:
    assert set(TRANSITIONS) == set(JOB_STATES)
    assert {after for row in TRANSITIONS.values() for after in row} <= set(JOB_STATES)


def test_terminal_states_never_change() -> None:
    assert {"succeeded", "failed", "cancelled"} == TERMINAL
    assert not any(can_change(end, state) for end in TERMINAL for state in JOB_STATES)


def test_every_state_can_still_end() -> None:
    def ends(state: str, seen: frozenset[str]) -> bool:
        return state in TERMINAL or any(ends(after, seen | {state}) for after in TRANSITIONS[state] - seen)

    assert all(ends(state, frozenset()) for state in JOB_STATES)
    assert not OWNED & TERMINAL
