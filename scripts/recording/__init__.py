"""Records what real QEMUs answer, for the cases in tests/cases."""
