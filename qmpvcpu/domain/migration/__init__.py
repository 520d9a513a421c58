"""Migration and saving, from the plan to the verified end."""
